"""What users pass as prompts: text, token ids, and what tokenizers return.

| given | meaning |
|---|---|
| `str`, `tokenizers.Encoding` | one prompt |
| integers: a list, a range, an array or a tensor (T,) | one prompt |
| an array or a tensor (B, T), a list of prompts | B prompts |
| a mapping with "input_ids" and perhaps "attention_mask", such as transformers' `BatchEncoding` | the same as its ids |

Tokens whose mask is 0 are padding, on the left or the right, and not part of the prompt. Arrays and tensors are
recognised by their attributes, so that no library has to be imported for it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tvm_attn.errors import GenerationError, PromptTooLongError, TokenizerError, one_line, shorten
from tvm_attn.numbers import is_bool
from tvm_attn.runtime.dlpack import host_array

if TYPE_CHECKING:
    from tvm_attn.config import GPT2Config
    from tvm_attn.runtime.tokenizer import Tokenizer

IdArray: TypeAlias = npt.NDArray[np.integer[Any]]
Prompt: TypeAlias = str | Sequence[int] | IdArray | Mapping[str, Any]

FIELDS = ("input_ids", "attention_mask", "token_type_ids")
"""Fields of a mapping that say something about the prompt; also keywords of `Model.generate` and similar methods."""

_IGNORED = ("special_tokens_mask", "offset_mapping", "length")
_MOST_CHARACTERS_A_TOKEN = 1024  # if the tokenizer does not know
_MOST_TOKENS = 1 << 20  # beyond any model's context: a range may be too long to read
_HINT = "pass text, a list of token ids, an array or tensor of integers, or what a tokenizer returns"


@dataclass(frozen=True)
class Prompts:
    """Prompts as given, not yet checked against a model.

    Attributes:
        items: the text or the ids (T,) of each prompt; ids are an integer array or a list of int.
        is_single: whether a single prompt was given, not a list.
        masks: (T,) bool for each prompt that has a mask, true for tokens that count.
    """

    items: list[str | IdArray | list[int]]
    is_single: bool
    masks: list[npt.NDArray[np.bool_] | None]

    def unpadded(self, index: int) -> str | IdArray | list[int]:
        """The text or the ids of a prompt, without its padding."""
        item, mask = self.items[index], self.masks[index]
        if mask is None:
            return item
        places = np.flatnonzero(mask)
        return item[slice(places[0], places[-1] + 1) if len(places) else slice(0)]

    def matrix(self, config: GPT2Config) -> tuple[list[npt.NDArray[np.int32]], npt.NDArray[np.bool_]]:
        """The ids of B prompts of one length T, each without its padding, and which of them are padding, (B, T) bool.

        Raises:
            GenerationError: there are no prompts, or they are text, of different lengths, or do not fit the model.
        """
        if any(isinstance(item, str) for item in self.items):
            raise GenerationError("logits takes token ids (B, T); tokenize the text first")
        lengths = sorted({len(item) for item in self.items})
        if not lengths or (self.is_single and self.masks[0] is None):
            shape = f"of shape ({lengths[0]},)" if lengths else "empty"
            raise GenerationError(f"ids must be integers (B, T), but are {shape}")
        if len(lengths) > 1:
            message = f"ids have rows of {lengths[0]} to {lengths[-1]} tokens"
            raise GenerationError(f"{message}; pad them and pass attention_mask, or make one call for each")
        names = [f"row {index}" for index in range(len(self.items))]
        rows = [checked_ids(name, self.unpadded(i), config) for i, name in enumerate(names)]  # type: ignore[arg-type]
        counted = [np.ones(lengths[0], bool) if mask is None else mask for mask in self.masks]
        return rows, ~np.stack(counted)


def read_prompts(given: Any, fields: Mapping[str, Any] | None = None) -> Prompts:
    """Reads prompts, or the `fields` of a mapping that were passed as keywords.

    Raises:
        GenerationError: the value is none of the above; the message says what it is.
    """
    fields = {name: value for name, value in (fields or {}).items() if value is not None}
    given = _with_ndim("the prompt", given)
    if fields and given is not None:
        if "input_ids" in fields:
            raise GenerationError("prompts and input_ids are both given; pass one of them")
        if _is_mapping(given) or _is_encoding(given):
            raise GenerationError(f"{next(iter(fields))} is given twice; the tokenizer's result already has it")
        fields["input_ids"] = given
    if fields:
        return _from_mapping("the prompt", fields)
    if given is None:
        raise GenerationError(f"there is no prompt; {_HINT}")
    if _is_mapping(given):
        return _from_mapping("the prompt", given)
    if _is_prompt(given):
        item, mask = _item("the prompt", given)
        return Prompts([item], True, [mask])
    rows = _rows("the prompt", given)
    items = [_item(f"prompt {index + 1} of {len(rows)}", row) for index, row in enumerate(rows)]
    return Prompts([item for item, _ in items], False, [mask for _, mask in items])


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_encoding(value: Any) -> bool:
    """Whether the value is a `tokenizers.Encoding`."""
    return hasattr(value, "ids") and hasattr(value, "attention_mask") and hasattr(value, "offsets")


def _is_array(value: Any) -> bool:
    return any(hasattr(value, name) for name in ("__array__", "__array_interface__", "__dlpack__"))


def _is_id(value: Any) -> bool:
    """Whether the value stands for a token id, including a bool, which is refused later."""
    return hasattr(type(value), "__index__") and getattr(value, "ndim", 0) == 0


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _is_prompt(value: Any) -> bool:
    """Whether the value is one prompt rather than several; the empty list is not one."""
    if isinstance(value, str) or _is_encoding(value):
        return True
    if _is_array(value):
        return getattr(value, "ndim", None) == 1
    return _is_list(value) and bool(value) and _is_id(value[0])  # len fails for ranges beyond 2**63


def _rows(name: str, given: Any) -> Sequence[Any]:
    """Several prompts, as a sequence of them."""
    if _is_array(given):
        return list(_id_array(name, given, 2))
    if not _is_list(given):
        hint = "make it a list first, with list(...)" if hasattr(given, "__iter__") and not _is_bytes(given) else _HINT
        raise GenerationError(f"{name} is {_described(given)}; {hint}")
    sequence: Sequence[Any] = given
    return sequence


def _is_bytes(value: Any) -> bool:
    return isinstance(value, bytes | bytearray | memoryview)


def _item(name: str, given: Any) -> tuple[str | IdArray | list[int], npt.NDArray[np.bool_] | None]:
    """The text or ids of one prompt, and its mask."""
    if isinstance(given, str):
        return given, None
    if _is_mapping(given):
        found = _from_mapping(name, given)
        if not found.is_single:
            raise GenerationError(f"{name} holds several prompts; pass only it, or one row of it")
        return found.items[0], found.masks[0]
    if _is_encoding(given):
        return list(given.ids), _mask(name, given.attention_mask, len(given.ids))
    if _is_array(given):
        return _id_array(name, given, 1), None
    if not _is_list(given):
        raise GenerationError(f"{name} is {_described(given)}; {_HINT}")
    ids = [_id(name, index, value) for index, value in enumerate(islice(given, _MOST_TOKENS + 1))]
    if len(ids) > _MOST_TOKENS:
        raise GenerationError(f"{name} has more than {_MOST_TOKENS} tokens; shorten the prompt")
    return ids, None


def _id(name: str, index: int, value: Any) -> int:
    try:
        if _is_id(value) and not is_bool(value):
            return operator.index(value)
    except Exception:  # a tensor of floats, or on a device without values
        pass
    raise GenerationError(f"{name} is not token ids: its item {index} is {_described(value)}; {_HINT}")


def read_array(name: str, given: Any) -> npt.NDArray[Any]:
    """An array or a tensor of any library as a NumPy array.

    Raises:
        GenerationError: NumPy cannot read it, or it has masked elements.
    """
    try:
        array = host_array(given)
    except Exception as error:
        message = f"{name} is a {type(given).__name__} that NumPy cannot read ({one_line(error)})"
        raise GenerationError(f"{message}; {_HINT}") from None
    if np.ma.is_masked(array) or np.ma.is_masked(given):
        raise GenerationError(f"{name} has masked elements; leave them out, or pass attention_mask")
    return array


def _with_ndim(name: str, given: Any) -> Any:
    """An array that does not say how many dimensions it has, such as PyArrow's, as NumPy's; others unchanged."""
    is_silent = _is_array(given) and not isinstance(given, Mapping) and not hasattr(given, "ndim")
    return read_array(name, given) if is_silent else given


def _id_array(name: str, given: Any, ndim: int) -> IdArray:
    """Ids (T,) of one prompt, or (B, T)."""
    array = read_array(name, given)
    if array.ndim != ndim or (array.dtype.kind not in "iu" and array.size):
        message = f"{name} is {array.dtype} of shape {array.shape}"
        raise GenerationError(f"{message}; ids must be integers (T,), or (B, T) for several prompts")
    return array


def _from_mapping(name: str, given: Mapping[str, Any]) -> Prompts:
    """The prompts in a tokenizer's result."""
    if "input_ids" not in given:
        found = ", ".join(shorten(key) for _, key in zip(range(5), given, strict=False)) or "nothing"
        raise GenerationError(f'{name} is a mapping that holds {found} but no "input_ids"; {_HINT}')
    for key in given:
        if key not in FIELDS + _IGNORED:
            raise GenerationError(f"{name} holds {shorten(key)}, which is not supported; leave it out")
    ids, mask, types = (given.get(key) for key in FIELDS)
    ids = _with_ndim("input_ids", ids)
    if isinstance(ids, str) or ids is None or _is_mapping(ids):
        raise GenerationError(f"{name}: input_ids is {_described(ids)}; it must be token ids")
    if types is not None and read_array("token_type_ids", types).any():
        raise GenerationError(f"{name} has token_type_ids that are not 0, which is not supported; leave them out")
    is_single = _is_prompt(ids)
    rows = [ids] if is_single else _rows(name, ids)
    if mask is None:
        masks: Sequence[Any] = [None] * len(rows)
    else:
        masks = [mask] if is_single else _mask_rows(mask)
    if len(masks) != len(rows):
        raise GenerationError(f"attention_mask has {len(masks)} rows and input_ids {len(rows)}; they must be the same")
    names = [name] if is_single else [f"prompt {index + 1} of {len(rows)}" for index in range(len(rows))]
    items = [_ids_row(label, row) for label, row in zip(names, rows, strict=True)]
    read = [
        None if row is None else _mask(label, row, len(item))
        for label, row, item in zip(names, masks, items, strict=True)
    ]
    return Prompts([*items], is_single, read)


def _ids_row(name: str, row: Any) -> IdArray | list[int]:
    if isinstance(row, str) or _is_mapping(row):
        raise GenerationError(f"{name} of input_ids is {_described(row)}; it must be token ids")
    item, _ = _item(name, row)
    assert not isinstance(item, str)
    return item


def _mask_rows(given: Any) -> Sequence[Any]:
    if _is_array(given):
        given = read_array("attention_mask", given)
    if not _is_list(given) and getattr(given, "ndim", 0) == 0:
        raise GenerationError(f"attention_mask is {_described(given)}; it must have the shape of input_ids")
    return list(given)


def _mask(name: str, given: Any, length: int) -> npt.NDArray[np.bool_]:
    """An attention mask (T,) of 0 and 1, whose ones must be contiguous."""
    array = read_array(f"{name}'s attention_mask", given)
    if array.shape != (length,):
        raise GenerationError(f"{name} has {length} tokens and an attention_mask of shape {array.shape}")
    mask = array.astype(bool)
    if array.dtype.kind not in "iubf" or (array != mask).any():
        raise GenerationError(f"{name}'s attention_mask holds values other than 0 and 1")
    if np.count_nonzero(np.diff(mask.astype(np.int8))) > (2 if length and not mask[0] and not mask[-1] else 1):
        raise GenerationError(f"{name}'s attention_mask has zeros between ones; padding must be at the ends")
    return mask


def _described(value: Any) -> str:
    """What kind of value it is, for a message."""
    if isinstance(value, str | int | float | None):
        return shorten(value)
    return f"a {type(value).__name__}"


def prompt_ids(
    name: str, prompt: str | IdArray | list[int], config: GPT2Config, tokenizer: Tokenizer | None
) -> npt.NDArray[np.int32]:
    """One prompt, without padding, as (T,) int32; `name` is used in messages.

    Empty text is the model's `bos_token_id`, else the first of its `eos_token_ids`.

    Raises:
        TokenizerError: it is text, and there is no tokenizer.
        GenerationError: as from `checked_ids`, or the text is certainly too long.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TokenizerError("the artifact has no tokenizer; pass token ids instead of text")
        most = config.n_positions * (tokenizer.longest_token or _MOST_CHARACTERS_A_TOKEN)
        if len(prompt) > most:
            message = (
                f"{name} has {len(prompt)} characters, and the model's context, {config.n_positions} tokens, holds"
            )
            raise PromptTooLongError(f"{message} {most} at most; shorten the prompt")
        start = config.eos_token_ids[:1] if config.bos_token_id is None else (config.bos_token_id,)
        prompt = tokenizer.encode(prompt) or list(start)
    return checked_ids(name, prompt, config)


def checked_ids(name: str, ids: IdArray | list[int], config: GPT2Config) -> npt.NDArray[np.int32]:
    """One prompt's ids as (T,) int32.

    Raises:
        GenerationError: there are no ids, more than the model's context holds, or some outside its vocabulary.
    """
    if len(ids) > config.n_positions:
        message = f"{name} has {len(ids)} tokens, the model's context is {config.n_positions}; shorten the prompt"
        raise PromptTooLongError(message)
    return known_ids(name, ids, config)


def known_ids(name: str, ids: IdArray | list[int], config: GPT2Config) -> npt.NDArray[np.int32]:
    """As `checked_ids`, of any length.

    Raises:
        GenerationError: there are no ids, or some outside the vocabulary.
    """
    if len(ids) == 0:
        raise GenerationError(f"{name} has no tokens; pass at least one")
    for extreme in (min(ids), max(ids)):
        if not 0 <= extreme < config.vocab_size:
            message = f"{name} holds the token id {shorten(int(extreme))}"
            raise GenerationError(f"{message}; the model's vocabulary is 0..{config.vocab_size - 1}")
    return np.asarray(ids, np.int32)
