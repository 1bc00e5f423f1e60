"""Kernels with Hopper's warpgroup products: values and races in the emulation, and the compiled machine code."""

import functools

import pytest

from tests.cuda import sass
from tests.kernels.cuda.emulated import rolled
from tests.kernels.devices import assert_close, emulate
from tvm_attn import targets
from tvm_attn.errors import ScheduleError
from tvm_attn.kernels import Case, Head, Linear, PrefillAttention, QKVLinear, ResidualLinear
from tvm_attn.kernels.cuda import hopper_attention, hopper_matmul
from tvm_attn.kernels.cuda.hopper_attention import HEAD_DIMS, HopperTiles
from tvm_attn.kernels.linear import LinearKernel
from tvm_attn.schedule import schedule
from tvm_attn.targets import CudaTarget

ATTENTION = [
    case
    for case in PrefillAttention.cases()
    if case.kernel.activations != "float32" and case.kernel.head_dim in HEAD_DIMS
]
PRODUCTS = [
    case
    for family in (Linear, ResidualLinear, QKVLinear, Head)
    for case in family.cases()
    if case.kernel.groups is None and hopper_matmul.suits(case.kernel) and case.kernel.activations != "float32"
]


def named(case: Case) -> str:
    return f"{type(case.kernel).__name__}-{case.kernel.activations}-{case.name}"


@functools.cache
def attention(kernel: PrefillAttention) -> object:
    """The next tiles for each kernel, so that different kernels get different ones."""
    kernels = list(dict.fromkeys(case.kernel for case in ATTENTION))
    tiles = (HopperTiles(2, 64, 3), HopperTiles(1, 32, 2), HopperTiles(3, 48, 4), HopperTiles(1, 128, 3))
    with rolled():
        return hopper_attention.hopper_attention(kernel, tiles[kernels.index(kernel) % len(tiles)])


@functools.cache
def product(kernel: LinearKernel) -> object:
    kernels = list(dict.fromkeys(case.kernel for case in PRODUCTS))
    tiles = ((1, 64, 3), (2, 96, 4), (1, 128, 5), (3, 64, 3))
    with rolled():
        return hopper_matmul.hopper_matmul(kernel, hopper_matmul.tiles_of(*tiles[kernels.index(kernel) % len(tiles)]))


@pytest.mark.parametrize("case", ATTENTION, ids=named)
def test_attention_is_that_of_the_reference(case: Case) -> None:
    assert_close(case, emulate(attention(case.kernel), case))


@pytest.mark.parametrize("case", PRODUCTS, ids=named)
def test_products_are_those_of_the_reference(case: Case) -> None:
    assert_close(case, emulate(product(case.kernel), case))


def test_no_two_accesses_to_shared_memory_race() -> None:
    for case, function in ((ATTENTION[0], attention(ATTENTION[0].kernel)), (PRODUCTS[0], product(PRODUCTS[0].kernel))):
        assert_close(case, emulate(function, case, races=True))


def test_the_emulation_misses_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ATTENTION[0]
    monkeypatch.setattr(hopper_attention, "wgmma_wait", lambda pending: None)
    with rolled():
        function = hopper_attention.hopper_attention(case.kernel, HopperTiles(1, 64, 3))
    with pytest.raises(AssertionError):
        assert_close(case, emulate(function, case))


def hopper() -> CudaTarget:
    target = targets.resolve("cuda-sm90")
    assert isinstance(target, CudaTarget)
    return target


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_attention_machine_code(head_dim: int, dtype: str) -> None:
    kernel = PrefillAttention(12, head_dim, 1024, 8, dtype, head_dim**-0.5, dtype)
    tiles = hopper_attention.default_hopper_tiles(kernel)
    assert tiles in list(hopper_attention.hopper_candidates(kernel))
    function = schedule(kernel, hopper())
    ((name, resources),) = sass.resources(function, "sm_90a").items()
    # 128 dimensions spill a few addresses; they ran at 294 TFLOP/s on an H100 all the same.
    assert resources.spills <= (0 if head_dim == 64 else 48) and resources.registers * tiles.threads <= 65536
    instructions = sass.sass(function, "sm_90a")[name]
    # The first scores, and then scores and outputs in the loop, and the last outputs.
    assert sass.count(instructions, "HGMMA") == 2 * (head_dim // 16 + tiles.keys // 16)
    assert sass.count(instructions, "HMMA") == 0
    assert sass.count(instructions, "USETMAXREG") == 2
    assert "serialized" not in sass.log(function, "sm_90a")


@pytest.mark.parametrize(
    "kernel",
    [
        QKVLinear(768, 2304, 8, 1, "float16", activations="float16", heads=12, context=1024, cache_dtype="float16"),
        Linear(768, 3072, 8, 1, "bfloat16", activations="bfloat16", activation="gelu_new"),
        ResidualLinear(3072, 768, 8, 1, "float16", activations="float16"),
        Linear(8192, 8192, 8, 1, "float16", activations="float16", max_groups=1024),
    ],
    ids=lambda kernel: type(kernel).__name__,
)
def test_product_machine_code(kernel: LinearKernel) -> None:
    function = schedule(kernel, hopper())
    ((name, resources),) = sass.resources(function, "sm_90a").items()
    assert resources.spills == resources.stack == 0
    instructions = sass.sass(function, "sm_90a")[name]
    assert sass.count(instructions, "HGMMA") == 64 // 16 and sass.count(instructions, "HMMA") == 0
    assert "serialized" not in sass.log(function, "sm_90a")


def test_few_rows_and_quantized_weights_keep_the_other_products() -> None:
    for kernel in (
        Linear(768, 3072, 8, 1, "float16", activations="float16", max_groups=8),
        Linear(768, 3072, 8, 1, "int8", activations="float16"),
    ):
        instructions = "".join(sass.sass(schedule(kernel, hopper()), "sm_90a").values())
        assert sass.count(instructions, "HGMMA") == 0 and sass.count(instructions, "HMMA") > 0


def test_tiles_that_do_not_fit_are_refused() -> None:
    kernel = Linear(768, 3072, 8, 1, "float16", activations="float16")
    for tiles in (
        hopper_matmul.tiles_of(2, 256, 6),
        hopper_matmul.tiles_of(2, 264, 3),
        hopper_matmul.tiles_of(2, 64, 2),
    ):
        with pytest.raises(ScheduleError, match="does not fit"):
            hopper_matmul.hopper_matmul(kernel, tiles)
