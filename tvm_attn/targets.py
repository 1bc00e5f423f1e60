"""Hardware that tvm_attn compiles for: reading `targets/*.toml`, finding the one for this machine.

`targets/README.md` explains the keys.
"""

from __future__ import annotations

import platform
import sys
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
class Target:
    """One kind of hardware, as its file says.

    Attributes:
        name: the file's name without `.toml`, e.g. "cpu-znver4".
        device: "cpu".
        description: one line for people.
        architecture: `platform.machine()` of the hardware, e.g. "x86_64".
        processor: LLVM's name of the processor, or None in a generic file.
        rank: among generic targets that fit, the highest is taken; 0 where `processor` is given.
        tvm: what `tvm.target.Target` takes.
        features: instruction sets that compiled code may use, as Linux names them.
        lanes: float32 values in a vector register.
        tile_rows: rows of a register tile and of a row group.
        tile_columns: columns of a packed weight strip, a power of two.
        l2_bytes: level-2 cache of a core.
        dtypes: storage dtypes that can be compiled.
        peak: measured limits, or None where nobody has measured.
    """

    name: str
    device: str
    description: str
    architecture: str
    processor: str | None
    rank: int
    tvm: dict[str, Any]
    features: tuple[str, ...]
    lanes: int
    tile_rows: int
    tile_columns: int
    l2_bytes: int
    dtypes: tuple[str, ...]
    peak: Peak | None

    def fits_this_machine(self) -> bool:
        """Whether code for this target can run here."""
        return self.architecture == platform.machine() and set(self.features) <= cpu_features()


def names() -> list[str]:
    """The names of all targets, sorted."""
    return sorted(path.stem for path in resource_dir("targets").glob("*.toml"))


def read(name: str) -> Target:
    """The target of that name.

    Raises:
        TargetError: no such file, or the file is malformed.
    """
    if name not in names():
        raise TargetError(f"unknown target {name!r}; known targets: cpu, {', '.join(names())}")
    return _read_file(resource_dir("targets") / f"{name}.toml")


def _read_file(path: Path) -> Target:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        detect, peak = table["detect"], table.get("peak")
        return Target(
            name=path.stem,
            device=table["device"],
            description=table["description"],
            architecture=detect["architecture"],
            processor=detect.get("processor"),
            rank=detect.get("rank", 0),
            tvm=table["tvm"],
            features=tuple(table["features"]),
            lanes=table["vector"]["lanes"],
            tile_rows=table["tile"]["rows"],
            tile_columns=table["tile"]["columns"],
            l2_bytes=table["cache"]["l2_bytes"],
            dtypes=tuple(table["dtypes"]),
            peak=Peak(peak["float32_gflops"], peak["memory_gbytes"]) if peak else None,
        )
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path} is not valid TOML: {error}") from error
    except KeyError as error:
        raise TargetError(f"{path} lacks the key {error}; targets/README.md lists what a target file holds") from error


def resolve(name: str) -> Target:
    """The target that `--target` names: "cpu" is this machine's processor, anything else a file's name.

    Raises:
        TargetError: the target is unknown, or no file fits this machine.
    """
    if name in ("cuda", "vulkan"):
        raise TargetError(f"target {name!r} is not implemented yet; available: cpu, {', '.join(names())}")
    return detect_cpu() if name == "cpu" else read(name)


def detect_cpu() -> Target:
    """The target for this machine's processor: the file made for it, else the widest generic one that fits.

    Raises:
        TargetError: no file fits.
    """
    from tvm.target.codegen import llvm_get_system_cpu

    processor = llvm_get_system_cpu()
    fitting = [target for target in map(read, names()) if target.device == "cpu" and target.fits_this_machine()]
    exact = [target for target in fitting if target.processor == processor]
    generic = sorted((target for target in fitting if target.processor is None), key=lambda target: target.rank)
    candidates = exact or generic[-1:]
    if not candidates:
        raise TargetError(f"no file in targets/ fits this {platform.machine()} machine; known: {', '.join(names())}")
    return candidates[0]
