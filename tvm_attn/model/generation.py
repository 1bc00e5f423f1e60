"""A checkpoint's `generation_config.json`: the tokens that end a text, and its authors' sampling settings.

Like transformers, this takes the tokens from this file only if it exists, even if it names none, and otherwise from
`config.json`. Sampling settings are only recorded: they apply if a caller asks for them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_attn.config import GPT2Config
from tvm_attn.errors import CheckpointError, ConfigError, shorten
from tvm_attn.jsonfile import CONFIG_BYTES, exists, read_json, shorten_path

GENERATION_CONFIG = "generation_config.json"

# Settings that change what transformers generates and that tvm_attn lacks, with the values that disable them.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "diversity_penalty": (0, 0.0),
    "encoder_repetition_penalty": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1, 1.0),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0, 0.0),
    "sequence_bias": (),
    "suppress_tokens": (),
    "typical_p": (1, 1.0),
}
_DEFAULT_TOP_K = 50  # transformers' default if do_sample is set and top_k is not


def read_generation_config(folder: Path, config: GPT2Config) -> tuple[GPT2Config, dict[str, Any], list[str]]:
    """`config` with the token ids of the folder's `generation_config.json`, its options, and notes for the user.

    The options are fields of `tvm_attn.runtime.decoding.GenerationOptions` that have the effect of the file's settings
    in transformers. They are not checked.

    Raises CheckpointError if the file is unreadable, and ConfigError if a token id in it is malformed.
    """
    path = folder / GENERATION_CONFIG
    if not exists(path, CheckpointError):
        return config, {}, []
    settings = read_json(path, CONFIG_BYTES, CheckpointError)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{shorten_path(path)} is not a JSON object but {shorten(settings)}")
    ids = {name: settings[name] for name in ("bos_token_id", "pad_token_id") if settings.get(name) is not None}
    try:
        merged = replace(config, eos_token_id=settings.get("eos_token_id"), **ids)
    except ConfigError as error:
        raise ConfigError(f"{shorten_path(path)}: {error}") from None
    notes = []
    if config.eos_token_ids and not merged.eos_token_ids:
        ends = ", ".join(map(str, config.eos_token_ids))
        notes.append(
            f"{GENERATION_CONFIG} names no end token of the vocabulary, so no token ends a text, as in transformers; "
            f"config.json names {ends}: stop_token_ids ends there"
        )
    unsupported = [name for name, off in _UNSUPPORTED.items() if settings.get(name) not in (None, False, [], {}, *off)]
    if unsupported:
        notes.append(f"{GENERATION_CONFIG} also sets {', '.join(unsupported)}, which tvm_attn does not have")
    return merged, _options(settings), notes


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """transformers samples only with `do_sample`; without it, it ignores temperature, top_k, top_p and min_p."""
    options = {
        "max_new_tokens": settings.get("max_new_tokens"),
        "min_new_tokens": settings.get("min_new_tokens"),
        "repetition_penalty": settings.get("repetition_penalty"),
        "stop": settings.get("stop_strings"),
    }
    if settings.get("do_sample"):
        temperature, top_k = settings.get("temperature"), settings.get("top_k")
        options |= {
            "temperature": 1.0 if temperature is None else temperature,
            "top_k": _DEFAULT_TOP_K if top_k is None else top_k or None,  # 0 switches it off
            "top_p": settings.get("top_p"),
            "min_p": settings.get("min_p"),
        }
    return {name: value for name, value in options.items() if value is not None}
