"""Describes this very hardware as a target, from what the machine says."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_attn._resources import resource_dir
from tvm_attn.errors import DeviceError, TargetError
from tvm_attn.runtime.machine import cpu_features, usable_cores
from tvm_attn.storage import DTYPES
from tvm_attn.targets.base import Target
from tvm_attn.targets.cpu import CpuTarget
from tvm_attn.targets.cuda import CudaTarget
from tvm_attn.targets.files import read_all
from tvm_attn.targets.gpu import GpuTarget

_VECTOR = re.compile(r"avx|amx|fma|f16c|bmi|gfni|vaes|vpclmul|sve")
"""The instruction sets that code for a processor may use beyond what all of its architecture, and our targets, have."""
_ANY = re.compile(r"generic|i[3-6]86|x86-64(-v\d)?")
"""What LLVM calls a processor that it does not know."""


def detect(kind: str) -> Target:
    """The target for this machine's first device of a class, "cpu", "cuda" or "vulkan".

    The file that was made for exactly this hardware, the user's before one that comes along; else a description based
    on the widest one that fits, without a file: `write` makes one.

    Raises:
        DeviceError: there is no usable device of that class.
        TargetError: there is no such class, or no target fits a GPU.
    """
    describe = {"cpu": _processor, "cuda": _cuda, "vulkan": _vulkan}.get(kind)
    if describe is None:
        raise TargetError(f"{kind!r:.40} is no class of devices; give cpu, cuda or vulkan")
    return describe()


def detect_cpu() -> CpuTarget:
    """The target for this machine's processor: the file made for it, or else the widest generic one that fits, or else
    a description."""
    processor, known = _processor_name(), _fitting_processors()
    return _made_for(known, processor) or _widest(known) or _processor()


def _fitting_processors() -> list[CpuTarget]:
    return [target for target in read_all() if isinstance(target, CpuTarget) and not target.missing(cpu_features())]


def _processor_name() -> str:
    from tvm.target.codegen import llvm_get_system_cpu

    return str(llvm_get_system_cpu())


def _made_for(known: list[CpuTarget], processor: str) -> CpuTarget | None:
    return next(iter(_user_first(target for target in known if target.processor == processor)), None)


def _widest(known: list[CpuTarget]) -> CpuTarget | None:
    generic = [target for target in known if target.processor is None]
    return max(generic, key=lambda target: target.rank, default=None)


def _user_first(found: Iterable[Any]) -> list[Any]:
    shipped = resource_dir("targets")
    return sorted(found, key=lambda target: target.file.parent == shipped)


def _processor() -> CpuTarget:
    processor, known = _processor_name(), _fitting_processors()
    if made := _made_for(known, processor):
        return made
    base = _widest(known) or _from_nothing()
    unknown = _ANY.fullmatch(processor)
    tvm = base.tvm if unknown else base.tvm | {"mcpu": processor, "mattr": _attributes(base, processor)}
    model = _model_name()
    asked = {feature for target in read_all() for feature in target.features}
    return replace(
        base,
        name=f"cpu-{_slug(model or processor) if unknown else processor}",
        description=f"{model or platform.machine()} ({processor}), {usable_cores()} cores when it was described",
        tvm={key: value for key, value in tvm.items() if value != []},
        features=tuple(sorted(name for name in cpu_features() if name in asked or _VECTOR.match(name))),
        processor=processor,
        rank=0,
        l2_bytes=_l2_bytes() or base.l2_bytes,
        peak=None,
        based_on=base.name or None,
        file=None,
    )


def _from_nothing() -> CpuTarget:
    """What any processor with registers of 128 bits can be compiled for."""
    machine = platform.machine()
    return CpuTarget(
        *("", "cpu", "", {"kind": "llvm", "mtriple": f"{machine}-linux-gnu"}, 8, 8, tuple(DTYPES), None),
        *(machine, (), None, 0, 4, 1 << 19),
    )


def _attributes(base: CpuTarget, processor: str) -> list[str]:
    """The base's attributes, without the vector instructions that the processor has by its name and that this machine
    lacks: a virtual machine may hide some."""
    import tvm_ffi

    from tvm_attn.compiler.processors import features

    here = tvm_ffi.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    has = {str(name): bool(present) for name, present in here.items()}
    named = features(base.tvm.get("mtriple", f"{base.architecture}-linux-gnu"), processor)
    hidden = sorted(name for name in named if has.get(name) is False and _VECTOR.match(name))
    return [*base.tvm.get("mattr", []), *(f"-{name}" for name in hidden)]


def _model_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """The product's name as Linux gives it; empty if it does not."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^model name\s*:[ \t]*(\S.*)$", text, re.MULTILINE)
    return " ".join(found[1].split())[:200] if found else ""


def _l2_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """The share of a core in its level-2 cache, for a core that this process may use; None if Linux does not say."""
    cpu = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    for cache in sorted((root / f"cpu{cpu}" / "cache").glob("index*")):
        try:
            level, kind, size, sharing = (
                (cache / name).read_text(encoding="utf-8").strip()
                for name in ("level", "type", "size", "shared_cpu_list")
            )
            if level != "2" or kind == "Instruction":
                continue
            number, unit = re.fullmatch(r"(\d+)([KM]?)", size).groups()  # type: ignore[union-attr]
            cores = {_core(root, other) for other in _cpus(sharing)}
            return int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit] // max(1, len(cores)) or None
        except (OSError, ValueError, AttributeError):
            continue
    return None


def _cpus(text: str) -> list[int]:
    """[0, 1, 4] from "0-1,4", as Linux writes lists of processors."""
    ranges = (part.partition("-") for part in text.split(",") if part)
    return [cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)]


def _core(root: Path, cpu: int) -> str:
    """Names the core of which a logical processor is a thread."""
    topology = root / f"cpu{cpu}" / "topology"
    try:
        return "/".join((topology / name).read_text().strip() for name in ("physical_package_id", "core_id"))
    except OSError:
        return str(cpu)


def _cuda() -> CudaTarget:
    from tvm_attn.runtime.devices import cuda, device_class

    device = device_class("cuda").find()[0]
    limits = device.limits
    version = cuda.parse_capability(limits["compute_capability"])
    known = [target for target in read_all() if isinstance(target, CudaTarget)]
    fitting = [target for target in known if not list(device_class("cuda").lacks(target, device, "float32", "none"))]
    if not fitting:
        raise TargetError(f"no target fits {device.name} of compute capability {limits['compute_capability']}")
    name = f"cuda-sm{version[0]}{version[1]}-{_slug(device.name.removeprefix('NVIDIA '))}"
    for target in _user_first(fitting):
        of_this = _architecture(target) == version and target.multiprocessors == limits["multiprocessors"]
        if target.name == name or of_this:
            return target
    ranks = {target.name: cuda.code_rank(target.architectures, target.ptx, version) or () for target in fitting}
    base = max(fitting, key=lambda target: (ranks[target.name], -len(target.images)))
    exact = [base.tvm["arch"]] if _architecture(base) == version else [f"sm_{version[0]}{version[1]}"]
    return replace(
        base,
        name=name,
        description=f"{device.name} (compute capability {limits['compute_capability']})",
        tvm=base.tvm | {"arch": exact[0]},
        architectures=tuple(exact),
        ptx=None,
        multiprocessors=limits["multiprocessors"],
        peak=None,
        based_on=base.name,
        file=None,
    )


def _architecture(target: CudaTarget) -> tuple[int, int] | None:
    """The compute capability that a target is made for; None if it is made for several."""
    if len(target.images) != 1:
        return None
    digits = re.sub(r"\D", "", target.images[0])
    return int(digits[:-1]), int(digits[-1])


def _vulkan() -> GpuTarget:
    from tvm_attn.runtime.devices import device_class

    of_class = device_class("vulkan")
    device = of_class.find()[0]
    limits, features = device.limits, set(device.features)
    product = re.sub(r"\s*\((?!R\)|TM\)).*", "", device.name, flags=re.IGNORECASE).split(", ")[0].strip()
    name = f"vulkan-{_slug(product)}"
    known = [target for target in read_all() if isinstance(target, GpuTarget) and target.device == "vulkan"]
    fitting = {target.name: target for target in known if not list(of_class.lacks(target, device, "float32", "none"))}
    if name in fitting:
        return fitting[name]
    matrix = _matrix(limits.get("cooperative_matrices", []), features)
    base = fitting.get("vulkan-matrix") if matrix else None
    base = base or fitting.get("vulkan-generic")
    if base is None:
        raise DeviceError(f"{device.device} ({device.name}) has less than every Vulkan 1.3 device; update its driver")
    smallest, largest, usual = (limits[key] for key in ("min_subgroup_size", "max_subgroup_size", "subgroup_size"))
    subgroup = usual if "subgroup_shuffle" in features and 8 <= smallest <= usual <= largest <= 128 else None
    threads = _power_of_two(min(256, limits["max_workgroup_invocations"], limits["max_workgroup_size"][0]))
    shared = min(limits["max_shared_memory_bytes"], 1 << 16)
    matrix = matrix if subgroup else None
    halves = {"float16", "storage16"} <= features
    tvm = base.tvm | {
        "max_num_threads": threads,
        "max_threads_per_block": threads,
        "max_shared_memory_per_block": shared,
        "thread_warp_size": subgroup or 1,
    }
    return replace(
        base,
        name=name,
        description=f"{product}, as {device.driver or 'its driver'} describes it",
        tvm=tvm if matrix else {key: value for key, value in tvm.items() if key != "supports_cooperative_matrix"},
        dtypes=base.dtypes if halves else ("float32",),
        max_threads=threads,
        shared_bytes=shared,
        subgroup=subgroup,
        matrix=matrix,
        tile_rows=max(base.tile_rows, matrix[0]) if matrix else base.tile_rows,
        peak=None,
        based_on=base.name,
        file=None,
    )


def _matrix(found: list[dict[str, Any]], features: set[str]) -> tuple[int, int, int] | None:
    """The sizes of the matrices to multiply, float16 with float32 sums; 16 x 16 x 16 if the device has it."""
    if not {"cooperative_matrix", "vulkan_memory_model", "float16", "storage16"} <= features:
        return None
    sizes = [
        (entry["m"], entry["n"], entry["k"])
        for entry in found
        if (entry["a"], entry["b"], entry["c"], entry["result"]) == ("float16", "float16", "float32", "float32")
    ]
    usable = [size for size in sizes if all(_power_of_two(side) == side <= 64 for side in size)]
    return (16, 16, 16) if (16, 16, 16) in usable else max(usable, default=None)


def _power_of_two(limit: int) -> int:
    """The largest power of two up to a limit of at least 1."""
    return 1 << (limit.bit_length() - 1)


def _slug(text: str) -> str:
    """A product's name as part of a target's."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", text.lower())).strip("-")[:60] or "unknown"
