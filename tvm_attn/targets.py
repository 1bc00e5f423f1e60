"""Hardware that tvm_attn compiles for: reading `targets/*.toml`, finding the one for this machine.

`targets/README.md` explains the keys.
"""

from __future__ import annotations

import platform
import re
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_attn._resources import resource_dir
from tvm_attn.errors import TargetError
from tvm_attn.runtime.machine import cpu_features

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
        raise TargetError(f"unknown target {name!r}; known targets: {known}")
    return _read_file(resource_dir("targets") / f"{name}.toml")


def _read_file(path: Path) -> Target:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        peak = table.get("peak")
        common = {
            "name": path.stem,
            "device": table["device"],
            "description": table["description"],
            "tvm": table["tvm"],
            "tile_rows": table["tile"]["rows"],
            "tile_columns": table["tile"]["columns"],
            "dtypes": tuple(table["dtypes"]),
            "peak": Peak(peak["float32_gflops"], peak["memory_gbytes"]) if peak else None,
        }
        if table["device"] == "cpu":
            return _cpu_target(common, table)
        common |= _gpu_limits(table["gpu"])
        return _cuda_target(common, table["cuda"]) if table["device"] == "cuda" else GpuTarget(**common)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path} is not valid TOML: {error}") from error
    except KeyError as error:
        raise TargetError(f"{path} lacks the key {error}; targets/README.md lists what a target file holds") from error


def _cpu_target(common: dict[str, Any], table: dict[str, Any]) -> CpuTarget:
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


def _gpu_limits(gpu: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": platform.machine(),
        "features": (),
        "max_threads": gpu["max_threads"],
        "shared_bytes": gpu["shared_bytes"],
        "subgroup": gpu.get("subgroup"),
        "vector_bytes": gpu["vector_bytes"],
        "matrix": _matrix(gpu),
    }


def _cuda_target(common: dict[str, Any], cuda: dict[str, Any]) -> CudaTarget:
    architectures, ptx = tuple(cuda["architectures"]), cuda.get("ptx")
    if not architectures or not all(re.fullmatch(r"sm_\d+[af]?", name) for name in architectures):
        raise TargetError(f"cuda.architectures is {list(architectures)}; give a list such as ['sm_80', 'sm_90a']")
    if ptx is not None and not re.fullmatch(r"compute_\d+", ptx):
        raise TargetError(f"cuda.ptx is {ptx!r}; give a virtual architecture such as 'compute_80', or leave it out")
    return CudaTarget(**common, architectures=architectures, ptx=ptx)


def _matrix(gpu: dict[str, Any]) -> tuple[int, int, int] | None:
    if "matrix" not in gpu:
        return None
    if len(gpu["matrix"]) != 3:
        raise TargetError(f"gpu.matrix is {gpu['matrix']}; give three sizes, e.g. [16, 16, 16]")
    m, n, k = gpu["matrix"]
    return m, n, k


def resolve(name: str) -> Target:
    """The target that `--target` names: "cpu" is this machine's processor, "vulkan" any Vulkan device, anything else a
    file's name, as "cuda" is.

    Raises:
        TargetError: the target is unknown, or no file fits this machine.
    """
    if name == "cpu":
        return detect_cpu()
    return read("vulkan-generic" if name == "vulkan" else name)


def detect_cpu() -> CpuTarget:
    """The target for this machine's processor: the file made for it, else the widest generic one that fits.

    Raises:
        TargetError: no file fits.
    """
    from tvm.target.codegen import llvm_get_system_cpu

    processor = llvm_get_system_cpu()
    fitting = [target for target in map(read, names()) if isinstance(target, CpuTarget) and target.fits_this_machine()]
    exact = [target for target in fitting if target.processor == processor]
    generic = sorted((target for target in fitting if target.processor is None), key=lambda target: target.rank)
    candidates = exact or generic[-1:]
    if not candidates:
        raise TargetError(f"no file in targets/ fits this {platform.machine()} machine; known: {', '.join(names())}")
    return candidates[0]
