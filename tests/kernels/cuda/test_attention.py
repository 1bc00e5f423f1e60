"""Attention on tensor cores: tiles other than the default in the emulation, and the compiled machine code."""

import pytest

from tests.cuda import sass
from tests.kernels.cuda.emulated import rolled
from tests.kernels.devices import assert_close, emulate
from tvm_attn.compiler.workspaces import with_parameters
from tvm_attn.config import PRESETS
from tvm_attn.kernels import Case, DecodeAttention, PrefillAttention
from tvm_attn.kernels.cuda.attention import HEAD_DIMS
from tvm_attn.kernels.cuda.decode_attention import (
    DecodeTiles,
    decode_attention,
    decode_candidates,
    default_decode_tiles,
)
from tvm_attn.kernels.cuda.prefill_attention import (
    PrefillTiles,
    copy_place,
    default_prefill_tiles,
    prefill_attention,
    prefill_candidates,
)

PREFILL, DECODE = (
    [case for case in family.cases() if case.kernel.activations != "float32"]
    for family in (PrefillAttention, DecodeAttention)
)


def with_sizes(cases: list[Case], **sizes: int) -> list[Case]:
    """The cases of kernels with these sizes."""
    return [case for case in cases if all(getattr(case.kernel, name) == size for name, size in sizes.items())]


def test_prefill_in_three_stages() -> None:
    ragged = with_sizes(PREFILL, head_dim=64)[0]
    with rolled():
        function = prefill_attention(ragged.kernel, PrefillTiles(64, 64, 4, stages=3))
    assert_close(ragged, emulate(function, ragged))


def test_prefill_as_generated() -> None:
    """With all loops unrolled, as a device compiler gets it: fragments of queries, halves of keys."""
    ragged = with_sizes(PREFILL, head_dim=64)[0]
    assert_close(ragged, emulate(prefill_attention(ragged.kernel, PrefillTiles(32, 32, 1, 2)), ragged))


def test_decode_with_a_second_kernel() -> None:
    (ragged,) = with_sizes(DECODE, context=600)
    with rolled():
        function = decode_attention(ragged.kernel, DecodeTiles(2, 3, 20, last=False))
    assert_close(ragged, emulate(function, ragged))


def test_decode_of_many_keys_a_block() -> None:
    cases = with_sizes(DECODE, context=1024)
    with rolled():
        function = decode_attention(cases[0].kernel, DecodeTiles(16, 2, 64, 8))
    for case in cases:
        assert_close(case, emulate(function, case))


def test_decode_as_generated() -> None:
    """With all loops unrolled, as a device compiler gets it."""
    (ragged,) = with_sizes(DECODE, context=300)
    assert_close(ragged, emulate(decode_attention(ragged.kernel, DecodeTiles(4, 3, 100)), ragged))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_copies_into_shared_memory_use_all_banks(head_dim: int) -> None:
    """Eight threads store 16 bytes each at once: into different banks, which are 16 bytes times eight apart."""
    units, keys = head_dim // 8, 32
    places = [copy_place(index, units) for index in range(keys * units)]
    assert sorted(places) == [(row, unit) for row in range(keys) for unit in range(units)]
    for first in range(0, len(places), 8):
        assert {(row * (units + 1) + unit) % 8 for row, unit in places[first : first + 8]} == set(range(8))
    for first in range(0, len(places), 32):
        warp = set(places[first : first + 32])
        assert all((row, unit ^ 1) in warp for row, unit in warp), "half a sector is read"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_fit_every_device(head_dim: int) -> None:
    least = min(sass.SHARED_BYTES.values())
    prefill = PrefillAttention(12, head_dim, 1024, 8, "float16", 0.125, "float16")
    candidates = list(prefill_candidates(prefill))
    assert default_prefill_tiles(prefill) in candidates
    for tiles in candidates:
        assert tiles.queries % (16 * tiles.query_warps) == 0
        assert tiles.keys % (16 * tiles.key_warps) == 0
        assert tiles.shared_bytes(head_dim) <= least
    for rows, groups in ((1, 1), (8, 1), (8, None)):
        decode = DecodeAttention(12, head_dim, 1024, rows, "float16", 0.125, groups, "float16")
        decodes = list(decode_candidates(decode))
        assert default_decode_tiles(decode) in decodes
        assert all(tiles.shared_bytes(head_dim) <= 48 << 10 for tiles in decodes)
        assert groups is not None or not any(tiles.splits > 1 and tiles.last for tiles in decodes)


def test_indices_of_the_largest_cache() -> None:
    """Indices count elements in 32 bits."""
    config = PRESETS["gpt2-xl"]
    assert 64 * 2 * config.n_head * config.n_positions * config.head_dim < 2**31


def test_prefill_machine_code() -> None:
    kernel = PrefillAttention(12, 64, 1024, 8, "bfloat16", 0.125, "bfloat16")
    tiles = default_prefill_tiles(kernel)
    function = prefill_attention(kernel, tiles)
    ((name, resources),) = sass.resources(function, "sm_90a").items()
    assert resources.spills == resources.stack == 0
    assert resources.dynamic_shared == tiles.shared_bytes(64)
    assert resources.registers * tiles.threads <= 65536
    instructions = sass.sass(function, "sm_90a")[name]
    # Two products of a warp's 32 queries, 64 keys and 64 dimensions, in steps of 16, 8 and 16.
    products = 2 * (32 // 16) * (64 // 8) * (64 // 16)
    assert sass.count(instructions, "HMMA") == products
    # Each load serves both fragments of queries and two steps of keys or outputs.
    assert sass.count(instructions, "LDSM") == products // 4
    # Keys and values for the first stage, and again in the loop.
    assert sass.count(instructions, "LDGSTS.E.BYPASS.LTC128B.128") == 2 * (2 * tiles.keys * 64 // 8) // tiles.threads


def test_decode_machine_code() -> None:
    kernel = DecodeAttention(12, 64, 1024, 1, "float16", 0.125, 1, "float16")
    function = with_parameters("decode", decode_attention(kernel, default_decode_tiles(kernel)))
    ((name, resources),) = sass.resources(function).items()
    assert resources.spills == resources.stack == 0
    # Queries, and four keys and values.
    assert sass.count(sass.sass(function)[name], "LDG.E.128") == 9
