"""GPT-2's hyperparameters: the four published sizes, and reading Hugging Face's `config.json`.

The keys, their defaults and their meaning are those of `transformers.GPT2Config`. What the compiled model cannot
compute is refused here by name, so that later code need not check. Only the standard library is imported, because the
runtime reads an artifact's configuration with this module.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tvm_attn.errors import ConfigError, shorten

# transformers' names for the five supported activations; names on one line compute the same function.
ACTIVATIONS = {
    "gelu_new": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"),
    "gelu": ("gelu", "gelu_python"),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
    "tanh": ("tanh",),
}
_CANONICAL_ACTIVATION = {alias: name for name, aliases in ACTIVATIONS.items() for alias in aliases}

# `attribute_map` of transformers' GPT2Config: other names under which the sizes may be stored.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
_FLAGS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that say what tokens mean; the compiled functions do not depend on them."""

# Keys that change what the model computes in ways that tvm_attn does not implement; absent or falsy is fine.
_UNSUPPORTED = {
    "add_cross_attention": "cross-attention is not supported, only GPT-2 as a decoder-only language model",
    "is_encoder_decoder": "encoder-decoder models are not supported, only GPT-2 as a decoder-only language model",
    "pruned_heads": "pruned heads are not supported; use a checkpoint with all heads",
    "quantization_config": "quantized checkpoints are not supported; use the float weights and `build --quant`",
}
_MAX_LAYERS = 1024
_INT32_ELEMENTS = 2**31


@dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters of one GPT-2 model; the defaults are those of the smallest published size.

    Construction validates every field and resolves three of them: `n_inner=None` becomes `4 * n_embd`, an activation
    gets its canonical name (a key of `ACTIVATIONS`), and a token id outside the vocabulary is left out, since no such
    token can occur (configs of models with small vocabularies often keep transformers' default, 50256).
    `eos_token_id` is one id, a tuple of several that each end a text, or None.

    Raises ConfigError for a wrong type, a size out of range, or an unsupported value.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = None  # type: ignore[assignment]  # None is accepted, and resolved by __post_init__
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.n_inner is None:
            _check_size("n_embd", self.n_embd)
            object.__setattr__(self, "n_inner", 4 * self.n_embd)
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {shorten(getattr(self, name))}")
        _check_epsilon(self.layer_norm_epsilon)
        object.__setattr__(self, "layer_norm_epsilon", float(self.layer_norm_epsilon))
        object.__setattr__(self, "activation_function", _activation(self.activation_function))
        for name in TOKEN_IDS:
            ids = _token_ids(name, getattr(self, name), self.vocab_size)
            object.__setattr__(self, name, ids if len(ids) > 1 else ids[0] if ids else None)
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        self._check_limits()

    def _check_limits(self) -> None:
        """Kernels index with int32: no weight, and no activation of one full-length sequence, may need more."""
        if self.n_layer > _MAX_LAYERS:
            raise ConfigError(f"n_layer is {self.n_layer}, more than the supported {_MAX_LAYERS}")
        widths = {"vocab_size": self.vocab_size, "3 * n_embd": 3 * self.n_embd, "n_inner": self.n_inner}
        for rows in ("n_embd", "n_positions"):
            for width, columns in widths.items():
                if getattr(self, rows) * columns >= _INT32_ELEMENTS:
                    raise ConfigError(f"{rows} x {width} is more elements than int32 can index; reduce one of them")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text; none, one or several."""
        ids = self.eos_token_id
        return () if ids is None else ids if isinstance(ids, tuple) else (ids,)

    def attention_scale(self, layer: int) -> float:
        """Factor on the attention scores of block `layer` (counted from 0) before the softmax.

        1 / sqrt(head_dim) with `scale_attn_weights`, and a further 1 / (layer + 1) with
        `scale_attn_by_inverse_layer_idx` (Mistral's GPT-2 training, https://github.com/stanford-crfm/mistral).
        """
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "GPT2Config":
        """Read a parsed Hugging Face `config.json`; missing keys take transformers' defaults.

        Keys that only matter in training or for other heads (dropout, initializer_range, summary_*, ...) are ignored.

        Raises ConfigError for a model other than GPT-2, an unsupported feature, or a malformed value.
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"the configuration must be a JSON object, not {shorten(config)}")
        model_type = config.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise ConfigError(f"model_type is {shorten(model_type)}; only gpt2 is supported")
        for key, reason in _UNSUPPORTED.items():
            if config.get(key):
                raise ConfigError(f"{key} is set: {reason}")
        auto_map = config.get("auto_map")
        if isinstance(auto_map, Mapping) and any(str(key).startswith("AutoModel") for key in auto_map):
            raise ConfigError(
                "auto_map names the checkpoint's own model code, which is not run; only gpt2 is supported"
            )
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {key: value for key, value in config.items() if key in known}
        for alias, name in _ALIASES.items():
            if alias in config and values.setdefault(name, config[alias]) != config[alias]:
                raise ConfigError(f"{alias} ({shorten(config[alias])}) contradicts {name} ({shorten(values[name])})")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary with Hugging Face's keys; `from_dict` and transformers read it back."""
        return {"model_type": "gpt2", **asdict(self)}


def param_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Canonical parameter names and shapes, in canonical order.

    Names are Hugging Face's without `transformer.`; the weights of attention and MLP are (in, out), as in Hugging
    Face's Conv1D. `lm_head.weight` exists only if the word embeddings are not tied.
    """
    embd, inner = config.n_embd, config.n_inner
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, embd),
        "wpe.weight": (config.n_positions, embd),
    }
    for layer in range(config.n_layer):
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (embd,),
            "ln_1.bias": (embd,),
            "attn.c_attn.weight": (embd, 3 * embd),
            "attn.c_attn.bias": (3 * embd,),
            "attn.c_proj.weight": (embd, embd),
            "attn.c_proj.bias": (embd,),
            "ln_2.weight": (embd,),
            "ln_2.bias": (embd,),
            "mlp.c_fc.weight": (embd, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, embd),
            "mlp.c_proj.bias": (embd,),
        }
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (embd,), "ln_f.bias": (embd,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, embd)
    return shapes


def _check_size(name: str, value: Any) -> None:
    if not _is_int(value):
        raise ConfigError(f"{name} must be a whole number, not {shorten(value)}")
    if not 1 <= value < _INT32_ELEMENTS:
        raise ConfigError(f"{name} must be at least 1 and fit in int32, not {shorten(value)}")


def _check_epsilon(value: Any) -> None:
    if not (_is_int(value) or isinstance(value, float)):
        raise ConfigError(f"layer_norm_epsilon must be a number, not {shorten(value)}")
    if not 0 < value < 1:  # also refuses NaN
        raise ConfigError(f"layer_norm_epsilon must be between 0 and 1, not {shorten(value)}")


def _activation(value: Any) -> str:
    if not isinstance(value, str) or value not in _CANONICAL_ACTIVATION:
        raise ConfigError(f"activation_function is {shorten(value)}; supported are {', '.join(ACTIVATIONS)}")
    return _CANONICAL_ACTIVATION[value]


def _token_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids of a field that is one id, a list or null, without duplicates and without ids outside the vocabulary."""
    values = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if name != "eos_token_id" and len(values) > 1:
        raise ConfigError(f"{name} lists {len(values)} tokens; it must be one token id or null")
    least = -math.inf if name == "pad_token_id" else 0  # -1 is usual for no padding token
    for token_id in values:
        if not _is_int(token_id) or token_id < least:
            raise ConfigError(f"{name} must be a token id or null, not {shorten(value)}")
    return tuple(dict.fromkeys(token_id for token_id in values if 0 <= token_id < vocab_size))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


PRESETS = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
