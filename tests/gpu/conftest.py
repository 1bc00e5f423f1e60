"""What runs on a CUDA device: `pytest -m gpu`, or `python3 run.py -m pytest tests/gpu` in a bundle (docs/cuda.md).

In a bundle there is no compiler: artifacts and kernels are those that were packed. In a checkout they are compiled.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu.parts import artifacts_of

ROOT = Path(__file__).parents[2]
ARTIFACTS = Path(os.environ.get("TVM_ATTN_GPU_ARTIFACTS", ROOT / "artifacts"))
KERNELS = Path(os.environ.get("TVM_ATTN_GPU_KERNELS", ROOT / "kernels"))
DEVICE = "cuda:0"
_PACKED = [artifact.folder.name for artifact in artifacts_of(ARTIFACTS)]
_BUILT = {
    "float32": ("float32", "none"),
    "float16": ("float16", "none"),
    "bfloat16": ("bfloat16", "none"),
    "int8": ("float16", "int8"),
    "int4": ("bfloat16", "int4"),
}
"""Of the demo model, where none are packed: dtype and quantization."""


def _obstacle() -> str | None:
    from tvm_attn.runtime.devices import device_class
    from tvm_attn.runtime.tvm_import import import_tvm

    import_tvm()
    return device_class("cuda").obstacle(0)


def _has_compiler() -> bool:
    spec = find_spec("tvm")
    return spec is not None and any(
        (Path(folder) / "lib" / "libtvm_compiler.so").is_file() for folder in spec.submodule_search_locations or ()
    )


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """Skips everything where there is no CUDA device, and says why."""
    if reason := _obstacle():
        pytest.skip(f"needs a CUDA device: {reason}")


@pytest.fixture(scope="session", params=_PACKED or list(_BUILT))
def artifact(request: pytest.FixtureRequest, gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each artifact for CUDA: the packed ones, or the demo model in every dtype."""
    if _PACKED:
        return ARTIFACTS / request.param
    if not _has_compiler():
        pytest.skip(f"no artifacts for CUDA in {ARTIFACTS}, and no compiler; TVM_ATTN_GPU_ARTIFACTS names a folder")
    from tvm_attn.compiler.build import build

    dtype, quant = _BUILT[request.param]
    folder = tmp_path_factory.mktemp("gpu") / request.param
    build("demo", "cuda", dtype, quant, out=folder, verify=False)
    return folder


@pytest.fixture(scope="session")
def kernels(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single kernels with their cases: the packed ones, or all that there are."""
    if (KERNELS / "kernels.json").is_file():
        return KERNELS
    if not _has_compiler():
        pytest.skip(f"no kernels in {KERNELS}, and no compiler; TVM_ATTN_GPU_KERNELS names a folder")
    from benchmarks.gpu.kernel_library_build import write_kernel_library

    folder = tmp_path_factory.mktemp("gpu") / "kernels"
    write_kernel_library("cuda", folder)
    return folder
