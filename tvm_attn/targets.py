"""Hardware that tvm_attn compiles for: reading `targets/*.toml`, finding the one for this machine.

`targets/README.md` explains the keys.
"""

from __future__ import annotations

import platform
import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_attn._resources import resource_dir
from tvm_attn.checks import POSITIVE, TABLE, integer, list_of, one_of, power_of_two, problem, text
from tvm_attn.errors import TargetError, one_line, shorten
from tvm_attn.jsonfile import CONFIG_BYTES, read_text, shorten_path
from tvm_attn.runtime.machine import cpu_features
from tvm_attn.storage import DTYPES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Peak:
    """Measured limits of the hardware, all cores together.

    Attributes:
        float32_gflops: float32 multiply-adds, 10^9 operations a second.
        memory_gbytes: reading memory, 10^9 bytes a second.
    """

    float32_gflops: float
    memory_gbytes: float


@dataclass(frozen=True)
class Target(ABC):
    """One kind of hardware, as its file says; `CpuTarget`, `GpuTarget` or `CudaTarget`.

    Attributes:
        name: the file's name without `.toml`, e.g. "cpu-znver4".
        device: "cpu", "cuda" or "vulkan".
        description: one line for people.
        tvm: what `tvm.target.Target` takes.
        tile_rows: rows of a register tile and of a row group.
        tile_columns: columns of a packed weight strip, a power of two.
        dtypes: storage dtypes that can be compiled.
        peak: measured limits, or None where nobody has measured.
        architecture: `platform.machine()` of the processor that runs the code, or the host's part of it, e.g. "x86_64".
        features: instruction sets of that processor that the code may use, as Linux names them.
    """

    name: str
    device: str
    description: str
    tvm: dict[str, Any]
    tile_rows: int
    tile_columns: int
    dtypes: tuple[str, ...]
    peak: Peak | None
    architecture: str
    features: tuple[str, ...]

    @abstractmethod
    def fits_this_machine(self) -> bool:
        """Whether code for this target can run here."""


@dataclass(frozen=True)
class CpuTarget(Target):
    """A processor with vector units.

    Attributes:
        processor: LLVM's name of the processor, or None in a generic file.
        rank: among generic targets that fit, the highest is taken; 0 where `processor` is given.
        lanes: float32 values in a vector register.
        l2_bytes: level-2 cache of a core.
    """

    processor: str | None
    rank: int
    lanes: int
    l2_bytes: int

    def fits_this_machine(self) -> bool:
        """Whether the architecture is this machine's and the processor has the instruction sets."""
        return self.architecture == platform.machine() and set(self.features) <= cpu_features()


@dataclass(frozen=True)
class GpuTarget(Target):
    """A GPU; the host's part of its libraries is compiled for any processor of this machine's architecture.

    Attributes:
        max_threads: threads of a block (a workgroup).
        shared_bytes: shared (workgroup) memory of a block.
        subgroup: threads of a subgroup (a warp) that may exchange registers, or None where nothing is assumed.
        vector_bytes: the widest load of a thread.
        matrix: M, N, K of the matrices that a subgroup multiplies, float16 with float32 sums; None where nothing is
            assumed.
    """

    max_threads: int
    shared_bytes: int
    subgroup: int | None
    vector_bytes: int
    matrix: tuple[int, int, int] | None

    def fits_this_machine(self) -> bool:
        """Whether the first device of the class has what the target assumes."""
        from tvm_attn.inventory import obstacle

        return obstacle(self) is None


@dataclass(frozen=True)
class CudaTarget(GpuTarget):
    """NVIDIA GPUs.

    Attributes:
        architectures: those whose machine code a library holds, as nvcc names them, e.g. ("sm_80", "sm_90a"). Code for
            sm_XY runs on X.Y and later minor versions; code for sm_90a on 9.0 alone.
        ptx: the virtual architecture whose PTX a library holds for the driver to compile where no machine code fits,
            e.g. "compute_80"; None for no PTX.
    """

    architectures: tuple[str, ...]
    ptx: str | None

    @property
    def images(self) -> tuple[str, ...]:
        """What a library holds code for, machine code first."""
        return (*self.architectures, *((self.ptx,) if self.ptx else ()))


def names() -> list[str]:
    """The names of all targets, sorted."""
    return sorted(path.stem for path in resource_dir("targets").glob("*.toml"))


def read(name: str) -> Target:
    """The target of that name.

    Raises:
        TargetError: no such file, or the file is malformed.
    """
    if name not in names():
        known = ", ".join(sorted({"cpu", "vulkan", *names()}))
        raise TargetError(f"unknown target {shorten(name)}; known targets: {known}")
    return _read_file(resource_dir("targets") / f"{name}.toml")


def read_all() -> list[Target]:
    """All targets, sorted by name. Warns of a file that is malformed and leaves it out."""
    found = []
    for name in names():
        try:
            found.append(read(name))
        except TargetError as error:
            warnings.warn(f"a target is left out: {error}", stacklevel=1)
    return found


_RULES: dict[str, Any] = {
    "device": one_of("cpu", "cuda", "vulkan"),
    "description": text(),
    "dtypes": list_of(one_of(*DTYPES), f"a list of {', '.join(DTYPES)}", least=1, most=3),
    "tvm": TABLE,
    "tile": {"rows": integer(1, 64), "columns": power_of_two(1, 1024)},
    "peak?": {"float32_gflops": POSITIVE, "memory_gbytes": POSITIVE, "measured?": text()},
}
_GPU_RULES = _RULES | {
    "gpu": {
        "max_threads": power_of_two(32, 1024),
        "shared_bytes": integer(1, 1 << 20),
        "subgroup?": power_of_two(1, 128),
        "vector_bytes": power_of_two(4, 16),
        "matrix?": list_of(power_of_two(1, 64), "three sizes such as [16, 16, 16]", least=3, most=3),
    }
}
_DEVICE_RULES: dict[str, Any] = {
    "cpu": _RULES
    | {
        "features": list_of(text(r"[\w.-]+"), "a list of instruction sets"),
        "detect": {"architecture": text(r"\w+"), "processor?": text(r"[\w.-]+"), "rank?": integer(0, 1000)},
        "vector": {"lanes": power_of_two(1, 64)},
        "cache": {"l2_bytes": integer(1, 1 << 40)},
    },
    "vulkan": _GPU_RULES,
    "cuda": _GPU_RULES
    | {
        "cuda": {
            "architectures": list_of(text(r"sm_\d+[af]?"), "a list such as ['sm_80', 'sm_90a']", least=1),
            "ptx?": text(r"compute_\d+", "a virtual architecture such as 'compute_80', or leave it out"),
        }
    },
}
_TVM_KINDS = {"cpu": "llvm", "cuda": "cuda", "vulkan": "vulkan"}


def _read_file(path: Path) -> Target:
    try:
        table = tomllib.loads(read_text(path, CONFIG_BYTES, TargetError))
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{shorten_path(path)} is not valid TOML: {one_line(error)}") from None
    device = table.get("device")
    rules = _DEVICE_RULES.get(device, _RULES) if isinstance(device, str) else _RULES
    if fault := problem(table, rules) or _misfit(table):
        raise TargetError(f"{shorten_path(path)}: {fault}; targets/README.md lists what a target file holds")
    return _target(path.stem, table)


def _misfit(table: dict[str, Any]) -> str | None:
    """What does not go together in a table whose values are right one by one."""
    device, tile, gpu = table["device"], table["tile"], table.get("gpu", {})
    if table["tvm"].get("kind") != _TVM_KINDS[device]:
        return f"tvm.kind is {shorten(table['tvm'].get('kind'))}; give {_TVM_KINDS[device]!r}"
    if device == "cpu" and tile["columns"] % table["vector"]["lanes"]:
        return f"tile.columns is {tile['columns']}; give a multiple of vector.lanes, {table['vector']['lanes']}"
    if "matrix" in gpu and "subgroup" not in gpu:
        return "gpu.matrix needs gpu.subgroup"
    if "subgroup" in gpu and table["tvm"].get("thread_warp_size") != gpu["subgroup"]:
        return f"tvm.thread_warp_size is {shorten(table['tvm'].get('thread_warp_size'))}; give that of gpu.subgroup"
    return None


def _target(name: str, table: dict[str, Any]) -> Target:
    peak, tile = table.get("peak"), table["tile"]
    common = {
        "name": name,
        "device": table["device"],
        "description": table["description"],
        "tvm": table["tvm"],
        "tile_rows": tile["rows"],
        "tile_columns": tile["columns"],
        "dtypes": tuple(table["dtypes"]),
        "peak": Peak(peak["float32_gflops"], peak["memory_gbytes"]) if peak else None,
    }
    if table["device"] == "cpu":
        detect = table["detect"]
        return CpuTarget(
            **common,
            architecture=detect["architecture"],
            features=tuple(table["features"]),
            processor=detect.get("processor"),
            rank=detect.get("rank", 0),
            lanes=table["vector"]["lanes"],
            l2_bytes=table["cache"]["l2_bytes"],
        )
    gpu = table["gpu"]
    matrix = gpu.get("matrix")
    common |= {
        "architecture": platform.machine(),
        "features": (),
        "max_threads": gpu["max_threads"],
        "shared_bytes": gpu["shared_bytes"],
        "subgroup": gpu.get("subgroup"),
        "vector_bytes": gpu["vector_bytes"],
        "matrix": None if matrix is None else tuple(matrix),
    }
    if table["device"] == "vulkan":
        return GpuTarget(**common)
    cuda = table["cuda"]
    return CudaTarget(**common, architectures=tuple(cuda["architectures"]), ptx=cuda.get("ptx"))


def resolve(name: str) -> Target:
    """The target that `--target` names: "cpu" is this machine's processor, "vulkan" any Vulkan device, anything else a
    file's name, as "cuda" is.

    Raises:
        TargetError: the target is unknown, or no file fits this machine.
    """
    if name == "cpu":
        return detect_cpu()
    return read("vulkan-generic" if name == "vulkan" else name)


def check_names(names: str) -> list[Target]:
    """Looks for the targets that `--target` names, separated by commas, as far as that takes no TVM.

    Returns:
        All but "cpu".

    Raises:
        TargetError: one is unknown or named twice, or its file is malformed.
    """
    wanted = [name.strip() for name in names.split(",")]
    found = [resolve(name) for name in wanted if name != "cpu"]  # LLVM knows the name of this machine's processor
    if len(set(wanted)) != len(wanted):
        raise TargetError("a target is named twice")
    return found


def detect_cpu() -> CpuTarget:
    """The target for this machine's processor: the file made for it, else the widest generic one that fits.

    Raises:
        TargetError: no file fits.
    """
    from tvm.target.codegen import llvm_get_system_cpu

    processor = llvm_get_system_cpu()
    fitting = [target for target in read_all() if isinstance(target, CpuTarget) and target.fits_this_machine()]
    exact = [target for target in fitting if target.processor == processor]
    generic = sorted((target for target in fitting if target.processor is None), key=lambda target: target.rank)
    candidates = exact or generic[-1:]
    if not candidates:
        raise TargetError(f"no file in targets/ fits this {platform.machine()} machine; known: {', '.join(names())}")
    return candidates[0]
