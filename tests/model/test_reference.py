"""The PyTorch reference against transformers' GPT2LMHeadModel, with random weights that reach every parameter."""

import sys
import warnings
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from tvm_attn.config import ACTIVATIONS, GPT2Config
from tvm_attn.errors import VerificationError
from tvm_attn.model.checkpoint import cast_params, random_params
from tvm_attn.model.reference import Reference

Dtype = Literal["float32", "float64"]

SMALL: dict[str, Any] = {"vocab_size": 101, "n_positions": 24, "n_embd": 48, "n_layer": 3, "n_head": 4}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd vocabulary": {"vocab_size": 1021},
    "head_dim 48": {"n_head": 1},
    "head_dim 6": {"n_head": 8},
    "one layer": {"n_layer": 1},
    "narrow MLP": {"n_inner": 20},
    "wide MLP": {"n_inner": 333},
    "large epsilon": {"layer_norm_epsilon": 1e-2},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled, scaled by layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
    "untied, odd": {"tie_word_embeddings": False, "vocab_size": 67, "n_embd": 39, "n_head": 3, "n_inner": 71},
    **{f"activation {name}": {"activation_function": name} for name in ACTIVATIONS},
}


def config_of(**changes: Any) -> GPT2Config:
    return GPT2Config(**{**SMALL, "bos_token_id": None, "eos_token_id": None, **changes})


def params_of(config: GPT2Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Random parameters, matrices enlarged so that attention is far from uniform and activations from linear."""
    return {name: array * (8 if array.ndim == 2 else 1) for name, array in random_params(config, seed)}


def ids_of(config: GPT2Config, batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, tokens))


def transformers_logits(
    config: GPT2Config, params: dict[str, np.ndarray], ids: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    values: dict[str, Any] = {**config.to_dict(), "attn_implementation": "eager"}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**values))
    state = {name if name.startswith("lm_head") else f"transformer.{name}": a for name, a in params.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = params["wte.weight"]
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    with torch.inference_mode():
        logits: np.ndarray = model.to(dtype).eval()(torch.from_numpy(ids)).logits.numpy()
    return logits


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_equals_transformers_in_float64(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    params, ids = params_of(config), ids_of(config, batch=2, tokens=config.n_positions)
    logits = Reference(config, params, "float64").logits(ids)
    expected = transformers_logits(config, params, ids, torch.float64)
    assert logits.shape == (2, config.n_positions, config.vocab_size)
    assert logits.dtype == np.float64
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("reorder", [False, True])
def test_equals_transformers_in_float32(reorder: bool) -> None:
    config = config_of(reorder_and_upcast_attn=reorder)
    params, ids = params_of(config), ids_of(config, batch=1, tokens=17)
    logits = Reference(config, params).logits(ids)
    assert logits.dtype == np.float32
    # Two float32 computations in different orders: each may be as far from exact as the other.
    exact = Reference(config, params, "float64").logits(ids)
    theirs = transformers_logits(config, params, ids, torch.float32)
    assert np.square(logits - exact).mean() <= 4 * np.square(theirs - exact).mean()


def test_is_causal_and_rows_are_independent() -> None:
    config = config_of()
    reference = Reference(config, params_of(config), "float64")
    ids = ids_of(config, batch=3, tokens=13)
    logits = reference.logits(ids)
    changed = ids.copy()
    changed[1, 7] = (changed[1, 7] + 1) % config.vocab_size
    differs = np.abs(reference.logits(changed) - logits).max(axis=-1) > 1e-9
    assert not differs[[0, 2]].any()
    assert not differs[1, :7].any()
    assert differs[1, 7:].all()
    for length in (1, 7):
        np.testing.assert_allclose(reference.logits(ids[:, :length]), logits[:, :length], rtol=0, atol=1e-11)


@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64, np.uint16])
def test_takes_ids_of_any_integer_dtype(ids_dtype: Any) -> None:
    config = config_of()
    reference = Reference(config, params_of(config))
    ids = ids_of(config, batch=1, tokens=5)
    np.testing.assert_array_equal(reference.logits(ids.astype(ids_dtype)), reference.logits(ids))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("computed", ["float32", "float64"])
def test_narrow_weights_are_upcast_exactly(dtype: str, computed: Dtype) -> None:
    config = config_of()
    narrow = dict(cast_params(params_of(config).items(), dtype))
    assert narrow["wte.weight"].dtype == (np.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    wide = {name: array.astype(np.float32) for name, array in narrow.items()}
    ids = ids_of(config, batch=1, tokens=9)
    logits = Reference(config, narrow, computed).logits(ids)
    np.testing.assert_array_equal(logits, Reference(config, wide, computed).logits(ids))


def test_float32_weights_are_not_copied() -> None:
    config = config_of()
    params = params_of(config)
    reference = Reference(config, params)
    ids = ids_of(config, batch=1, tokens=4)
    assert np.abs(reference.logits(ids)).max() > 0
    params["wte.weight"][:] = 0  # seen through the reference only if it reads the same memory
    np.testing.assert_array_equal(reference.logits(ids), np.zeros((1, 4, config.vocab_size)))


def test_read_only_weights_are_fine_and_stay_as_they_are() -> None:
    config = config_of()
    params = params_of(config)
    before = {name: array.copy() for name, array in params.items()}
    for array in params.values():
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reference(config, params).logits(ids_of(config, batch=1, tokens=4))
    for name, array in params.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    "ids",
    [
        np.zeros(3, np.int64),
        np.zeros((1, 25), np.int64),
        np.zeros((1, 0), np.int64),
        np.array([[101]]),
        np.array([[-1]]),
    ],
    ids=["one axis", "too long", "empty", "beyond the vocabulary", "negative"],
)
def test_bad_ids_are_refused(ids: np.ndarray) -> None:
    config = config_of()
    with pytest.raises(ValueError, match="ids must"):
        Reference(config, params_of(config)).logits(ids)


def test_says_how_to_get_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # `import torch` raises ImportError
    with pytest.raises(VerificationError, match=r"pip install torch"):
        Reference(config_of(), {})
