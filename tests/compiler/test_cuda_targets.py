"""Which libraries a build for CUDA makes."""

import pytest

from tvm_attn import targets
from tvm_attn.errors import TargetError


@pytest.mark.parametrize(
    ("names", "dtype", "expected"),
    [
        ("cuda", "float16", ["cuda", "cuda-sm90"]),
        ("cuda", "bfloat16", ["cuda", "cuda-sm90"]),
        ("cuda", "float32", ["cuda"]),
        ("cuda-sm90, cuda", "float16", ["cuda-sm90", "cuda"]),
        ("cuda-sm80", "float16", ["cuda-sm80"]),
        ("vulkan, cuda", "float16", ["vulkan-generic", "cuda", "cuda-sm90"]),
    ],
)
def test_cuda_brings_the_code_for_hopper(names: str, dtype: str, expected: list[str]) -> None:
    assert [target.name for target in targets.resolve_all(names, dtype)] == expected


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(TargetError):
        targets.resolve_all("cuda,nothing", "float16")


def test_what_only_newer_devices_can_do() -> None:
    able = {name for name in targets.names() if name.startswith("cuda") and targets.read(name).has_dependent_launch}  # type: ignore[attr-defined]
    assert able == {"cuda-sm90", "cuda-sm100", "cuda-sm120"}
