"""Packs everything that a machine without TVM and network needs to run, check and measure artifacts.

    python -m benchmarks.pack dist/gpt2 dist/demo --kernels cuda --python 3.12 --out dist/tvm-attn.tar.xz

The archive holds TVM's runtime without its compiler, tvm_attn, the artifacts, tests and benchmarks for a GPU, and
`run.py`, which starts a command with that machine's Python. It needs NumPy, and PyTorch for comparisons with it.
Random parameters are not packed: `run.py` makes them again from their seed.
"""

from __future__ import annotations

import argparse
import json
import lzma
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from benchmarks.restore import is_restorable
from tvm_attn.cli import Parser, progress, real, run
from tvm_attn.errors import BenchmarkError
from tvm_attn.runtime.artifact import MANIFEST, Artifact
from tvm_attn.runtime.devices.cuda import CUDART
from tvm_attn.runtime.machine import platform_name

ROOT = Path(__file__).parents[1]
TOP = "tvm-attn"
"""The folder that the archive unpacks to."""
LIMIT_MIB = 60

# These take precedence over the machine's packages, so that their versions match. Files that only compiling needs are
# left out, but not libtvm_ffi_testing.so: the extension module is linked with it.
_TVM = {
    "apache-tvm": ("tvm/3rdparty", "tvm/cmake", "tvm/include", "tvm/lib/libtvm_compiler.so", "tvm/src", "tvm/web"),
    "apache-tvm-ffi": ("tvm_ffi/3rdparty", "tvm_ffi/cython", "tvm_ffi/include", "tvm_ffi/share", "tvm_ffi/src"),
}
# These are used only if the machine lacks them: one folder each, and the module whose absence shows it.
_OTHERS = {
    "ml_dtypes": "ml_dtypes",
    "typing_extensions": "typing_extensions",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "platformdirs": "platformdirs",
    "rich": "rich",
    "tomli-w": "tomli_w",
    "markdown-it-py": "markdown_it",
    "mdurl": "mdurl",
    "pygments": "pygments",
    "pytest": "pytest",
    "pluggy": "pluggy",
    "iniconfig": "iniconfig",
    "packaging": "packaging",
}
# The library that TVM's CUDA runtime is linked with; PyTorch for CUDA 13 and CUDA toolkits have it too.
_CUDA_RUNTIME = ("nvidia-cuda-runtime", "nvidia.cu13")
_OURS = ("pyproject.toml", "LICENSE", "tvm_attn", "targets", "benchmarks", "tests/gpu", "docs/cuda.md")
_LEFT_OUT = (
    "benchmarks/pack.py",
    "benchmarks/pack_run.py",
    "benchmarks/results",
    "benchmarks/vulkan.py",
    "tvm_attn/vulkan/src",
)


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _pack(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.pack", description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT", help="folder that tvm-attn build wrote")
    parser.add_argument(
        "--kernels",
        metavar="TARGET",
        help="pack every kernel with its test cases, compiled for this CUDA target in some minutes, or a folder that "
        "python -m benchmarks.gpu.kernel_library_build made",
    )
    parser.add_argument(
        "--python",
        default=".".join(platform.python_version_tuple()[:2]),
        metavar="X.Y,...",
        help="versions of Python there; pip downloads what is compiled for another one than this: %(default)s",
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="take those from here instead of downloading")
    parser.add_argument("--out", type=Path, default=Path(f"dist/{TOP}.tar.xz"), metavar="FILE", help=".tar.xz or .tar")
    parser.add_argument(
        "--limit", type=real, default=LIMIT_MIB, metavar="MIB", help="largest archive; default: %(default)s"
    )
    parser.add_argument(
        "--preset", type=int, default=6, choices=range(10), metavar="0-9", help="xz level; default: %(default)s"
    )
    return parser


def _pack(args: argparse.Namespace) -> int:
    pythons = tuple(dict.fromkeys(version.strip() for version in args.python.split(",")))
    for folder in args.artifacts:
        Artifact(folder)  # refuses anything else before the work begins
    with tempfile.TemporaryDirectory(prefix="tvm-attn-pack-") as scratch, progress() as show:
        top = Path(scratch) / TOP
        show("collecting TVM's runtime and other packages")
        collect_packages(top, pythons, args.wheels, Path(scratch))
        show("collecting tvm_attn")
        _collect_ours(top)
        artifacts = [collect_artifact(folder, top) for folder in args.artifacts]
        if args.kernels and Path(args.kernels).is_dir():
            shutil.copytree(args.kernels, top / "kernels")
        elif args.kernels:
            from benchmarks.gpu.kernel_library_build import write_kernel_library

            write_kernel_library(args.kernels, top / "kernels", show)
        extra = {name: module for name, module in (*_OTHERS.items(), _CUDA_RUNTIME) if (top / "extra" / name).is_dir()}
        facts = {"platform": platform_name(), "pythons": pythons, "extra": extra, "artifacts": artifacts}
        (top / "bundle.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        show("compressing")
        size = write_archive(top, args.out, args.limit, args.preset)
    print(f"packed {args.out}: {size / 2**20:.1f} MiB for Python {', '.join(pythons)} on {platform_name()}")
    return 0


def collect_packages(top: Path, pythons: tuple[str, ...], wheels: Path | None, scratch: Path) -> None:
    """Copies installed packages, and adds the extension modules for other Python versions.

    Args:
        top: the bundle's folder.
        pythons: Python versions to support, "X.Y".
        wheels: folder with wheels of packages that are compiled for one Python version; None downloads them.
        scratch: a folder for downloads.

    Raises:
        BenchmarkError: a package is not installed here, or a wheel is not available.
    """
    here = ".".join(platform.python_version_tuple()[:2])
    bound = {name: _installed(name) for name in (*_TVM, *_OTHERS) if _is_bound(_installed(name))}
    found = []
    for version in pythons:
        if version != here:
            folder = wheels or _download(version, list(bound.values()), scratch / version)
            found += [(name, version, _find_wheel(folder, installed, version)) for name, installed in bound.items()]
    for name, left_out in _TVM.items():
        _copy_distribution(_installed(name), top / "site", left_out)
    for name in _OTHERS:
        _copy_distribution(_installed(name), top / "extra" / name, ())
    _copy_cuda_runtime(top)
    for name, version, wheel in found:
        _extract_extensions(wheel, top / ("site" if name in _TVM else f"extra/{name}"), version)


def _installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        raise BenchmarkError(f"{name} is not installed here, so it cannot be packed; pip install {name}") from None


def _files(installed: Distribution) -> list[PurePosixPath]:
    """An installed package's files in site-packages, without caches; of its .dist-info only METADATA."""
    kept = []
    for file in installed.files or ():
        path = PurePosixPath(file)
        described = path.parts[0].endswith(".dist-info") and path.name != "METADATA"
        if ".." not in path.parts and "__pycache__" not in path.parts and not described:
            kept.append(path)
    return kept


def _copy_distribution(installed: Distribution, folder: Path, left_out: tuple[str, ...]) -> None:
    for path in _files(installed):
        if not any(path == PurePosixPath(entry) or PurePosixPath(entry) in path.parents for entry in left_out):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(installed.locate_file(str(path))), target)


def _copy_cuda_runtime(top: Path) -> None:
    """Copies libcudart if its package is installed here: `runtime/devices/cuda.py` looks for it on the module path."""
    try:
        installed = distribution(_CUDA_RUNTIME[0])
    except PackageNotFoundError:
        return
    for path in _files(installed):
        if path.name == CUDART:
            target = top / "extra" / _CUDA_RUNTIME[0] / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(installed.locate_file(str(path))), target)


def _is_bound(installed: Distribution) -> bool:
    """Whether a package has extension modules for one particular version of Python."""
    return any(".cpython-" in path.name and path.name.endswith(".so") for path in _files(installed))


def _download(version: str, packages: list[Distribution], folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", version, "--dest", str(folder)]
    for tag in ("2_34", "2_31", "2_28", "2_27", "2_24", "2_17"):
        command += ["--platform", f"manylinux_{tag}_{platform.machine()}"]
    command += [f"{package.metadata['Name']}=={package.version}" for package in packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise BenchmarkError(f"no wheels for Python {version} ({cause}); name a folder that has them with --wheels")
    return folder


def _find_wheel(folder: Path, installed: Distribution, version: str) -> Path:
    name = installed.metadata["Name"].replace("-", "_")
    tag = "cp" + version.replace(".", "")
    for path in sorted(folder.glob("*.whl")):
        parts = path.name.lower().split("-")
        if parts[0] == name.lower() and parts[1] == installed.version and tag in parts[2].split("."):
            return path
    raise BenchmarkError(f"{folder} has no wheel of {name} {installed.version} for Python {version}")


def _extract_extensions(wheel: Path, folder: Path, version: str) -> None:
    """Extracts the extension modules of a wheel: everything else is the same for every Python."""
    suffix = f".cpython-{version.replace('.', '')}-"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if suffix in name and name.endswith(".so"):
                target = folder / PurePosixPath(name)
                target.write_bytes(archive.read(name))


def _collect_ours(top: Path) -> None:
    built = shutil.ignore_patterns("__pycache__")
    left_out = {ROOT / path for path in _LEFT_OUT}

    def ignore(folder: str, names: list[str]) -> set[str]:
        return built(folder, names) | {name for name in names if Path(folder, name) in left_out}

    for name in _OURS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, top / name, ignore=ignore)
        elif source.is_file():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, top / name)
    shutil.copy(ROOT / "benchmarks" / "pack_run.py", top / "run.py")
    # TVM finds the Vulkan runtime through the entry points of an installed package.
    described = _installed("tvm-attn")
    folder = top / "site" / f"tvm_attn-{described.version}.dist-info"
    folder.mkdir(parents=True)
    for name in ("METADATA", "entry_points.txt"):
        (folder / name).write_text(described.read_text(name) or "", encoding="utf-8")


def collect_artifact(folder: Path, top: Path) -> dict[str, str]:
    """Copies an artifact, without parameters that can be made again.

    Returns:
        Its name in the bundle, and whether its parameters are "packed" or "restored".

    Raises:
        ArtifactError: the artifact is damaged.
        BenchmarkError: two artifacts have the same name.
    """
    artifact, name = Artifact(folder), folder.resolve().name
    target, restored = top / "artifacts" / name, is_restorable(artifact)
    if target.exists():
        raise BenchmarkError(f"two artifacts are named {name}; rename one of the folders")
    files = [file for file in artifact.manifest["files"] if not (restored and file.startswith("params/"))]
    for file in files:
        path = target / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(artifact.read(file))
    shutil.copy(folder / MANIFEST, target / MANIFEST)
    return {"name": name, "parameters": "restored" if restored else "packed"}


def write_archive(top: Path, out: Path, limit_mib: float, preset: int) -> int:
    """Writes a folder as .tar.xz, or as .tar if that is the file's suffix; completely or not at all.

    Returns:
        The archive's size in bytes.

    Raises:
        BenchmarkError: it is larger than the limit, or cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            temporary = Path(scratch) / out.name
            with (
                lzma.open(temporary, "wb", preset=preset) if out.suffix == ".xz" else temporary.open("wb") as file,
                tarfile.open(fileobj=file, mode="w") as archive,
            ):
                for path in sorted(top.rglob("*")):
                    archive.add(path, path.relative_to(top.parent).as_posix(), recursive=False, filter=_anonymous)
            size = temporary.stat().st_size
            if size > limit_mib * 2**20:
                parts = ", ".join(f"{name} {bytes_ / 2**20:.1f}" for name, bytes_ in _largest(top))
                raise BenchmarkError(
                    f"the archive has {size / 2**20:.1f} MiB, more than {limit_mib:g}; uncompressed: {parts} MiB; "
                    "leave out an artifact or the kernels, or build for fewer architectures"
                )
            temporary.replace(out)
    except OSError as error:
        raise BenchmarkError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    return size


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _largest(top: Path) -> Iterator[tuple[str, int]]:
    """Bytes of the bundle's parts, largest first: folders of the first level, and each artifact and package."""
    sizes: dict[str, int] = {}
    for path in top.rglob("*"):
        if path.is_file():
            parts = path.relative_to(top).parts
            name = "/".join(parts[: 2 if parts[0] in ("artifacts", "site", "extra") else 1])
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    yield from sorted(sizes.items(), key=lambda entry: -entry[1])[:8]


if __name__ == "__main__":
    sys.exit(main())
