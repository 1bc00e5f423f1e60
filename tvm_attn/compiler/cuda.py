"""Compiles CUDA C to a fatbin (machine code for several architectures, PTX for later ones) without a GPU or a driver.

The compiler is nvcc from an installed CUDA toolkit (`CUDA_HOME`, `CUDA_PATH`, `PATH`), or else NVRTC from PyPI (the
extra `cuda`). Arithmetic is exactly that of CUDA C: division and square roots are rounded correctly and denormals are
kept, because `--use_fast_math` is not given. Kernels that need less accuracy ask for it themselves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tvm_attn.compiler import nvrtc
from tvm_attn.errors import CompileError
from tvm_attn.runtime.machine import usable_cores


@dataclass(frozen=True)
class Image:
    """Code for one architecture.

    Attributes:
        architecture: "sm_90a" for machine code, "compute_80" for PTX.
        code: the cubin, or the PTX text.
        log: the compiler's messages, including the resources of each kernel as `ptxas -v` prints them.
    """

    architecture: str
    code: bytes
    log: str


class CudaCompiler(ABC):
    """A compiler for CUDA C."""

    @abstractmethod
    def lacks(self, architectures: Sequence[str]) -> list[str]:
        """The architectures that this compiler does not know."""

    @abstractmethod
    def image(self, source: str, architecture: str) -> Image:
        """Machine code ("sm_80") or PTX ("compute_80"). Raises CompileError."""

    @abstractmethod
    def fatbin(self, source: str, architectures: Sequence[str]) -> bytes:
        """One image that the driver picks code from; it has to decompress only PTX. Raises CompileError."""


@dataclass(frozen=True)
class Nvcc(CudaCompiler):
    """The compiler of the CUDA toolkit."""

    path: Path

    def lacks(self, architectures: Sequence[str]) -> list[str]:
        """See `CudaCompiler`."""
        listed = subprocess.run([str(self.path), "--list-gpu-arch"], capture_output=True, text=True, check=False)
        known = set(re.findall(r"compute_(\d+)", listed.stdout))
        return [name for name in architectures if _digits(name) not in known]

    def image(self, source: str, architecture: str) -> Image:
        """See `CudaCompiler`."""
        kind = "--cubin" if architecture.startswith("sm_") else "--ptx"
        code, log = self._run(source, [kind, f"-arch={architecture}", "--ptxas-options=-v"])
        return Image(architecture, code, log)

    def fatbin(self, source: str, architectures: Sequence[str]) -> bytes:
        """See `CudaCompiler`."""
        options = [f"-gencode=arch={virtual},code=[{','.join(names)}]" for virtual, names in _families(architectures)]
        return self._run(source, ["--fatbin", f"--threads={usable_cores()}", *options])[0]

    def _run(self, source: str, options: Sequence[str]) -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory(prefix="tvm_attn-cuda-") as folder:
            path, output = Path(folder, "kernels.cu"), Path(folder, "kernels.out")
            path.write_text(source, encoding="utf-8")
            # -w: TVM's helper functions are declared whether or not a program uses them.
            command = [str(self.path), "-std=c++17", "-O3", "-w", *options, "-o", str(output), str(path)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode != 0 or not output.is_file():
                raise CompileError(f"{self.path} failed: {_first_error(done.stdout)}")
            return output.read_bytes(), done.stdout


@dataclass(frozen=True)
class Nvrtc(CudaCompiler):
    """NVRTC from the packages nvidia-cuda-nvrtc and nvidia-nvfatbin, with the headers of nvidia-cuda-runtime.

    Attributes:
        folder: the folder in which these packages install lib/ and include/.
    """

    folder: Path

    def lacks(self, architectures: Sequence[str]) -> list[str]:
        """See `CudaCompiler`; the versions that tvm-attn requires know all architectures."""
        return []

    def image(self, source: str, architecture: str) -> Image:
        """See `CudaCompiler`."""
        with tempfile.TemporaryDirectory(prefix="tvm_attn-cuda-") as folder:
            return self._image(_written(source, folder), architecture)

    def fatbin(self, source: str, architectures: Sequence[str]) -> bytes:
        """See `CudaCompiler`."""
        with tempfile.TemporaryDirectory(prefix="tvm_attn-cuda-") as folder:
            path, output = _written(source, folder), Path(folder, "kernels.fatbin")
            with ThreadPoolExecutor(usable_cores()) as pool:
                images = list(pool.map(lambda name: self._image(path, name), architectures))
            named = [(image.architecture, str(path.with_suffix(f".{image.architecture}"))) for image in images]
            self._run({"do": "combine", "library": self._library("nvfatbin"), "images": named, "output": str(output)})
            return output.read_bytes()

    def _image(self, source: Path, architecture: str) -> Image:
        output = source.with_suffix(f".{architecture}")
        # -default-device: TVM's helper functions lack __device__.
        options = ["-default-device", "--std=c++17", "--device-int128", "-w"]
        options += [f"-I{self.folder / 'include'}", f"-I{self.folder / 'include' / 'cccl'}"]
        if architecture.startswith("sm_"):
            options.append("--ptxas-options=-v")
        task = {"do": "compile", "library": self._library("nvrtc"), "architecture": architecture, "options": options}
        log = self._run({**task, "source": str(source), "output": str(output)})
        return Image(architecture, output.read_bytes(), log)

    def _run(self, task: dict[str, Any]) -> str:
        command = [sys.executable, "-I", nvrtc.__file__]
        done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CompileError(f"NVRTC failed: {_first_error(done.stdout + done.stderr)}")
        return done.stdout

    def _library(self, name: str) -> str:
        return str(next((self.folder / "lib").glob(f"lib{name}.so.*")))


def _written(source: str, folder: str) -> Path:
    path = Path(folder, "kernels.cu")
    path.write_text(source, encoding="utf-8")
    return path


def _families(architectures: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Virtual architectures, each with the code to make from its PTX; making PTX takes most of the time.

    A generation (sm_80, sm_86 and sm_89) shares one PTX; code for a single architecture (sm_90a) has its own.
    """
    families: dict[str, list[str]] = {}
    for name in sorted(architectures, key=lambda name: int(_digits(name))):
        number = name.partition("_")[2]
        generation = number[:-1] if number.isdigit() else number
        families.setdefault(generation, []).append(name)
    return [(f"compute_{names[0].partition('_')[2]}", names) for names in families.values()]


def _digits(architecture: str) -> str:
    return re.sub(r"\D", "", architecture)


def _first_error(text: str) -> str:
    """The line that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[-1] if lines else "no message")


def find_compiler(architectures: Sequence[str] = ()) -> CudaCompiler:
    """The compiler of this machine: nvcc if there is one that knows the architectures, else NVRTC.

    Raises:
        CompileError: neither is installed, or nvcc is older than an architecture.
    """
    packaged = _find_nvrtc()
    path = _find_nvcc()
    if path is not None:
        nvcc = Nvcc(path)
        missing = nvcc.lacks(architectures)
        if not missing:
            return nvcc
        if packaged is None:
            raise CompileError(
                f"{path} does not know {', '.join(missing)}: install a newer CUDA toolkit or "
                "NVRTC (in the checkout: pip install -e '.[cuda]'), or name a target that it knows, such as cuda-sm80"
            )
    if packaged is None:
        raise CompileError(
            "no CUDA compiler: install NVRTC (in the checkout: pip install -e '.[cuda]'), or NVIDIA's CUDA toolkit "
            "with nvcc on PATH or in CUDA_HOME; neither needs a GPU"
        )
    return packaged


def _find_nvcc() -> Path | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        folder = os.environ.get(variable)
        if folder and os.access(path := Path(folder, "bin", "nvcc"), os.X_OK):
            return path
    found = shutil.which("nvcc")
    return Path(found) if found else None


def _find_nvrtc() -> Nvrtc | None:
    """NVRTC in whichever folder of `nvidia` holds its packages; None if they are not installed."""
    spec = find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for candidate in sorted(Path(folder).glob("cu[0-9]*"), reverse=True):
            libraries = all(any((candidate / "lib").glob(f"lib{name}.so.*")) for name in ("nvrtc", "nvfatbin"))
            headers = ("cuda_fp16.h", "crt/host_defines.h", "cccl/cuda/std/cstdint")
            if libraries and all((candidate / "include" / name).is_file() for name in headers):
                return Nvrtc(candidate)
    return None


def compile_fatbin(source: str, architectures: Sequence[str]) -> bytes:
    """Compiles CUDA C for all architectures at once.

    Args:
        source: the translation unit.
        architectures: the machine code and PTX to make, e.g. ("sm_80", "sm_90a", "compute_80").

    Returns:
        A fatbin that `cuModuleLoadData` accepts.

    Raises:
        CompileError: there is no compiler, it is too old, or the source has an error.
    """
    return find_compiler(architectures).fatbin(source, architectures)
