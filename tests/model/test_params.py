"""What an artifact stores, and what that stands for: shapes and dtypes as documented, values within half a step."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tvm_attn.config import GPT2Config, param_shapes
from tvm_attn.errors import CheckpointError, ConfigError
from tvm_attn.model.checkpoint import random_params
from tvm_attn.model.params import effective_params, stored_params
from tvm_attn.storage import DTYPES, QUANTIZATIONS, stored_types

CONFIG = GPT2Config(vocab_size=61, n_positions=9, n_embd=64, n_layer=2, n_head=2, n_inner=96, tie_word_embeddings=False)
GROUP = 32
TABLES = ("wte.weight", "lm_head.weight")


@pytest.mark.parametrize("quant", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_as_the_artifact_says(dtype: str, quant: str) -> None:
    stored = dict(stored_params(random_params(CONFIG), dtype, quant))
    assert {name: (array.shape, str(array.dtype)) for name, array in stored.items()} == stored_types(
        CONFIG, dtype, quant
    )
    assert all(array.flags.c_contiguous for array in stored.values())


@pytest.mark.parametrize(("quant", "largest"), [("int8", 127), ("int4", 7)])
def test_effective_params_are_within_half_a_step(quant: str, largest: int) -> None:
    """Half of the group's largest value over `largest`, and the rounding of that step to float16."""
    original = dict(random_params(CONFIG))
    stored = dict(stored_params(original.items(), "float32", quant))
    effective = dict(effective_params(CONFIG, stored.__getitem__, quant))
    assert {name: array.shape for name, array in effective.items()} == param_shapes(CONFIG)
    for name, array in original.items():
        if array.ndim == 1 or name == "wpe.weight":
            np.testing.assert_array_equal(effective[name], array)
            continue
        wanted, found = (array.T, effective[name].T) if name in TABLES else (array, effective[name])
        step = np.abs(wanted.reshape(-1, GROUP, wanted.shape[1])).max(1).repeat(GROUP, axis=0) / largest
        assert (np.abs(found - wanted) <= step * (0.5 + largest * 2.0**-11)).all()
        assert np.abs(found - wanted).max() > 0


def one_large_value(name: str, value: float) -> Iterator[tuple[str, np.ndarray]]:
    for given, array in random_params(CONFIG):
        if given == name:
            array[3, 5] = value
        yield given, array


@pytest.mark.parametrize(("quant", "value"), [("int8", 1e7), ("int4", 5e5)])
@pytest.mark.parametrize("name", ["h.1.mlp.c_fc.weight", "wte.weight"])
def test_scale_that_float16_cannot_hold(name: str, quant: str, value: float) -> None:
    assert dict(stored_params(one_large_value(name, value / 10), "float32", quant))
    with pytest.raises(CheckpointError, match=rf"^{name} holds values up to \S+, too large for {quant} .*--quant none"):
        dict(stored_params(one_large_value(name, value), "float32", quant))


def stored_error(matrix: np.ndarray, quant: str) -> float:
    """Normalised squared error of what is stored of a matrix (K, N), in float64."""
    name = "h.0.mlp.c_fc.weight"
    stored = dict(stored_params([(name, matrix)], "float32", quant))
    values, scales = stored[name].astype(np.int64), stored[f"{name}_scales"].astype(np.float64)
    if quant == "int4":
        values = np.stack([values & 15, values >> 4], axis=1).reshape(matrix.shape) - 8
    found = values * scales.repeat(GROUP, axis=0)
    exact = matrix.astype(np.float64)
    return float(np.square(found / 2.0**-120 - exact / 2.0**-120).sum() / np.square(exact / 2.0**-120).sum())


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("source", [np.float32, np.float64])
def test_small_matrices_are_stored_well_or_refused(quant: str, source: type) -> None:
    """Over all magnitudes: nothing is stored whose error is more than about twice what it is for large values."""
    matrix = np.random.default_rng(0).standard_normal((64, 48))
    usual, refused = stored_error(matrix, quant), []
    for exponent in range(10, -150, -1):
        scaled = np.ldexp(matrix, exponent).astype(source)
        try:
            assert stored_error(scaled, quant) <= 2 * usual + 1e-6, exponent
        except CheckpointError as error:
            assert f"too small for {quant} with float16 scales" in str(error)
            assert "choose --quant none" in str(error)
            refused.append(exponent)
    assert refused == list(range(refused[0], -150, -1))  # once it is too small, it stays so
    assert -30 < refused[0] < -10


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_small_groups_beside_others_may_vanish(quant: str) -> None:
    matrix = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32) * np.float32(0.02)
    usual = stored_error(matrix, quant)
    matrix[:32, 7] *= 1e-9
    matrix[32:, 9] = 0
    assert stored_error(matrix, quant) == pytest.approx(usual, rel=0.1)
    zeros = dict(stored_params([("h.0.mlp.c_fc.weight", np.zeros((64, 48), np.float32))], "float32", quant))
    assert not zeros["h.0.mlp.c_fc.weight_scales"].any()


def test_values_that_scales_round_badly_are_no_reason() -> None:
    """Exact with exact scales: the rounding of the scales is then the whole error, and small."""
    signs = np.where(np.arange(64 * 48).reshape(64, 48) % 3, 1.0, -1.0)
    assert stored_error(signs * 1.001e-3, "int8") < 1e-5
    assert stored_error(signs * 1.001e-3, "int4") < 1e-5


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize(
    ("change", "message"),
    [({"n_embd": 40}, "wte.weight has 40"), ({"n_inner": 100}, r"h\.0\.mlp\.c_proj\.weight has 100")],
)
def test_width_that_no_group_divides(change: dict[str, int], message: str, quant: str) -> None:
    with pytest.raises(ConfigError, match=f"{quant} needs input widths in multiples of 32; {message}"):
        stored_types(replace(CONFIG, **change), "float32", quant)
    assert stored_types(replace(CONFIG, **change), "float32", "none")
