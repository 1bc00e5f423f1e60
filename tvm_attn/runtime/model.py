"""The public interface of a loaded model: logits, generate, stream."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from tvm_attn.config import GPT2Config
from tvm_attn.errors import GenerationError, TokenizerError, shorten
from tvm_attn.numbers import integer
from tvm_attn.runtime.artifact import Artifact, open_artifact
from tvm_attn.runtime.decoding import Completion, GenerationOptions, GenerationStats
from tvm_attn.runtime.device import parse_device
from tvm_attn.runtime.logprobs import MOST_LOGPROBS
from tvm_attn.runtime.machine import thread_count
from tvm_attn.runtime.prompts import FIELDS, Prompt, Prompts, known_ids, read_prompts
from tvm_attn.runtime.sampling import NOT_NUMBERS
from tvm_attn.runtime.scheduler import Scheduler
from tvm_attn.runtime.scoring import Progress, TextScore, checked_windows, score
from tvm_attn.runtime.tokenizer import Tokenizer
from tvm_attn.runtime.trace import MOST_BYTES, Prediction
from tvm_attn.runtime.tvm_import import import_tvm


class Model:
    """A loaded artifact, created by `tvm_attn.load`.

    Any number of threads and asyncio tasks may use it. Their sequences are computed together, up to `max_batch` at a
    time, and each gets what it would get on its own. After a fork the child has a copy; a model on a GPU must be loaded
    in the child instead.

    Attributes:
        config: the model's hyperparameters.
        tokenizer: the tokenizer, or None if the artifact has none; token ids work either way.
        generation_config: options of `GenerationOptions` from the checkpoint's generation_config.json. They are not
            used unless you pass them on: `model.generate(prompt, **model.generation_config)`.
        device: the device that it runs on, e.g. "cpu" or "cuda:0".
        scheduler: computes all requests; its `submit` starts one without waiting for it.
        engine: the compiled functions. Its calls leave logits on the device, where other libraries can take them
            through DLPack.
    """

    def __init__(
        self,
        artifact: Artifact,
        device: str,
        max_batch: int,
        *,
        graph: bool = True,
        stream: int | None = None,
        threads: int | None = None,
        draft: bool = True,
    ) -> None:
        import tvm

        from tvm_attn.runtime.device import choose_device
        from tvm_attn.runtime.engine import CompiledEngine

        library, kind, index = choose_device(artifact, device)
        self.config: GPT2Config = artifact.config
        self.generation_config = dict(artifact.generation)
        self.device = "cpu" if kind == "cpu" else f"{kind}:{index}"
        text = artifact.tokenizer_json()
        self.tokenizer = None if text is None else Tokenizer(text, model_vocab_size=self.config.vocab_size)
        self.engine = CompiledEngine(
            artifact,
            library,
            tvm.runtime.device(kind, index),
            max_batch,
            graph=graph,
            stream=stream,
            threads=threads,
            draft=draft,
        )
        self.scheduler = Scheduler(self.engine, self.tokenizer)

    def logits(self, ids: Any = None, **fields: Any) -> npt.NDArray[np.float32]:
        """Next-token logits after every token.

        Args:
            ids: integers (B, T) in 0 .. vocab_size - 1, 1 <= T <= n_positions: an array, nested lists, a tensor of
                PyTorch or another library with DLPack, on any device, or a tokenizer's result. Padding that its
                attention_mask marks is not part of a prompt.
            fields: input_ids and attention_mask, instead of `ids`.

        Returns:
            float32 (B, T, vocab_size); 0 for padding.

        Raises:
            GenerationError: the shape, the dtype, the mask or an id is wrong, or the logits are not numbers.
        """
        if unknown := set(fields) - set(FIELDS):
            raise GenerationError(f"unknown argument {shorten(min(unknown))}; pass ids, or {', '.join(FIELDS)}")
        prompts = read_prompts(ids, fields)
        rows, padded = prompts.matrix(self.config)
        result = np.zeros((*padded.shape, self.config.vocab_size), np.float32)
        done = 0
        while done < len(rows):
            write = partial(self._write_logits, result[done:], ~padded[done:], rows[done:])
            done += self.scheduler.call(write, len(rows) - done)
        if not np.isfinite(result[..., 0]).all():  # a NaN or infinity inside the model reaches every logit of a row
            raise GenerationError(f"the logits hold NaN, {NOT_NUMBERS}")
        return result

    def _write_logits(
        self,
        result: npt.NDArray[np.float32],
        places: npt.NDArray[np.bool_],
        rows: list[npt.NDArray[np.int32]],
        slots: list[int],
    ) -> int:
        """Writes the logits of the first rows, one for each slot; returns their number."""
        for index, logits in enumerate(self.engine.logits(rows[: len(slots)], slots)):
            result[index][places[index]] = logits
        return len(slots)

    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        context: int | None = None,
        stride: int | None = None,
        progress: Progress = lambda done, total: None,
    ) -> list[TextScore]:
        """How likely the model finds texts: the log-probability of each token, perplexity, bits per byte.

        Args:
            texts: as the prompts of `generate`, but of any length.
            context: tokens of a window, 2 .. n_positions; by default n_positions.
            stride: tokens from the beginning of a window to the next, 1 .. context; by default half a window. See
                `tvm_attn.runtime.scoring`.
            progress: called with the number of tokens scored so far, and of all.

        Returns:
            A `TextScore` for each text, also if there is only one.

        Raises:
            GenerationError: a text is empty, an option is out of range, or the logits are not numbers.
            TokenizerError: text was given and the artifact has no tokenizer.
        """
        context, stride = checked_windows(self.config.n_positions, context, stride)
        read = read_prompts(texts)
        ids: list[npt.NDArray[np.int32]] = []
        sizes: list[int | None] = []
        for number in range(len(read.items)):
            name = "the text" if len(read.items) == 1 else f"text {number + 1} of {len(read.items)}"
            item = read.unpadded(number)
            if isinstance(item, str):
                if self.tokenizer is None:
                    raise TokenizerError("the artifact has no tokenizer; pass token ids instead of text")
                ids.append(known_ids(name, self.tokenizer.encode(item), self.config))
                sizes.append(len(item.encode("utf-8")))
            else:
                ids.append(known_ids(name, item, self.config))
                sizes.append(None)
        logprobs = score(self.scheduler, ids, context, stride, progress)
        return [
            TextScore(tuple(tokens.tolist()), tuple(found), size)
            for tokens, found, size in zip(ids, logprobs, sizes, strict=True)
        ]

    def attention(
        self, prompt: Prompt, layers: int | Sequence[int] | None = None, heads: int | Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Attention weights: what each token takes from the tokens up to it.

        Args:
            prompt: text or token ids, T tokens.
            layers, heads: which ones; None means all.

        Returns:
            float32 (layers, heads, T, T); each row sums to 1, and is 0 after its own token.

        Raises:
            GenerationError: the prompt does not fit the model, there is no such layer or head, or the weights take more
                than 1 GiB: use `attention_layers`.
            TokenizerError: text was given and the artifact has no tokenizer.
        """
        ids = self.scheduler.prompt_ids(prompt)
        chosen = _chosen("layer", layers, self.config.n_layer), _chosen("head", heads, self.config.n_head)
        size = 4 * len(chosen[0]) * len(chosen[1]) * len(ids) ** 2
        if size > MOST_BYTES:
            message = f"the attention weights of {len(ids)} tokens take {size / 2**30:.1f} GiB"
            raise GenerationError(f"{message}; choose layers and heads, or take one layer at a time: attention_layers")
        return np.stack(list(self.attention_layers(ids, *chosen)))

    def attention_layers(
        self, prompt: Prompt, layers: int | Sequence[int] | None = None, heads: int | Sequence[int] | None = None
    ) -> Iterator[npt.NDArray[np.float32]]:
        """As `attention`, but one layer after the other: (heads, T, T) for each."""
        ids = self.scheduler.prompt_ids(prompt)
        chosen = _chosen("layer", layers, self.config.n_layer), _chosen("head", heads, self.config.n_head)
        trace = self.engine.trace(ids)
        return (trace.weights(layer)[chosen[1]] for layer in chosen[0])

    def logit_lens(self, prompt: Prompt, top: int = 5) -> list[list[Prediction]]:
        """What the model would predict after each token if it ended after fewer layers.

        Args:
            prompt: text or token ids, T tokens.
            top: how many tokens, 1 .. 20.

        Returns:
            For 0, 1, ... L layers and each token, ids and probabilities of the most likely next tokens, best first.

        Raises:
            GenerationError: the prompt does not fit the model, or an argument is out of range.
            TokenizerError: text was given and the artifact has no tokenizer.
        """
        top = integer("top", top, 1, MOST_LOGPROBS)
        trace = self.engine.trace(self.scheduler.prompt_ids(prompt))
        return [trace.predictions(depth, top) for depth in range(self.config.n_layer + 1)]

    # Every str is a Sequence[str] too; the first signature that matches is used.
    @overload
    def generate(
        self, prompts: str | Sequence[int], *, stats: GenerationStats | None = ..., **options: Any
    ) -> Completion: ...

    @overload
    def generate(
        self, prompts: Mapping[str, Any] | None = ..., *, stats: GenerationStats | None = ..., **options: Any
    ) -> Any: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, stats: GenerationStats | None = ..., **options: Any
    ) -> list[Completion]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt] | None = None, *, stats: GenerationStats | None = None, **options: Any
    ) -> Completion | list[Completion]:
        """Completes one prompt, or a list of them as one ragged batch.

        Args:
            prompts: text, token ids, a tokenizer's result, or a list of these; see `tvm_attn.runtime.prompts`.
            stats: filled with counts and times.
            options: the fields of `GenerationOptions`: max_new_tokens, min_new_tokens, n, temperature, top_k, top_p,
                min_p, repetition_penalty, stop, stop_token_ids, seed, logprobs, prompt_logprobs, speculate; None is the
                default.
                Greedy if no sampling option is given. Also input_ids and attention_mask instead of `prompts`, so that
                the result of a transformers tokenizer can be passed as `**inputs`.

        Returns:
            One `Completion`; for several prompts or n > 1 a list, n for each prompt, in the order of the prompts.

        Raises:
            GenerationError: an option is out of range, or a prompt is empty, too long or outside the vocabulary.
            TokenizerError: text was given and the artifact has no tokenizer.
        """
        read = _take_prompts(prompts, options)
        return self.scheduler.generate(read, _options(options), stats)

    def stream(
        self, prompt: Prompt | None = None, *, stats: GenerationStats | None = None, **options: Any
    ) -> Generator[str, None, Completion]:
        """Completes one prompt and yields its text piece by piece, never splitting a character.

        Arguments and errors as in `generate`; n must be 1. The generator returns the `Completion`. It starts when it is
        first advanced, then runs ahead of its reader, and is cancelled when it is closed or dropped.
        """
        read = _take_prompts(prompt, options)
        return self.scheduler.stream(read, _options(options), stats)

    def stream_ids(
        self, prompt: Prompt | None = None, *, stats: GenerationStats | None = None, **options: Any
    ) -> Generator[int, None, Completion]:
        """As `stream`, but yields token ids; needs no tokenizer if the prompt is ids."""
        read = _take_prompts(prompt, options)
        return self.scheduler.stream_ids(read, _options(options), stats)


def _chosen(kind: str, wanted: int | Sequence[int] | None, count: int) -> list[int]:
    """The chosen layers or heads, each in 0 .. count - 1."""
    if wanted is None:
        return list(range(count))
    several = list(wanted) if isinstance(wanted, Sequence | np.ndarray) else [wanted]
    if not several:
        raise GenerationError(f"no {kind} was chosen; pass some of 0..{count - 1}, or None for all")
    return [integer(f"a {kind}", number, 0, count - 1) for number in several]


def _take_prompts(prompts: Any, options: dict[str, Any]) -> Prompts:
    """The prompts, including those among the keyword arguments, which are removed from `options`."""
    return read_prompts(prompts, {name: options.pop(name) for name in FIELDS if name in options})


def _options(given: dict[str, Any]) -> GenerationOptions:
    unknown = sorted(set(given) - set(GenerationOptions.__dataclass_fields__))
    if unknown:
        known = ", ".join(GenerationOptions.__dataclass_fields__)
        raise GenerationError(f"unknown option {shorten(unknown[0])}; the options are {known}")
    return GenerationOptions(**given)


def load(
    folder: str | Path,
    device: str = "auto",
    *,
    threads: int | None = None,
    max_batch: int = 8,
    graph: bool = True,
    stream: int | None = None,
    draft: bool = True,
) -> Model:
    """Loads an artifact.

    Args:
        folder: a folder written by `tvm_attn.build`.
        device: "cpu", "cuda:0" or "vulkan:0", if the artifact has a library for it; "auto" is a GPU if there is one,
            else the CPU.
        threads: CPU threads, at most one per core; None takes TVM_NUM_THREADS, else all cores that this process may
            use. Models may have different numbers of threads.
        max_batch: KV-cache slots, the most sequences that are decoded together. A GPU's memory is taken at once, the
            CPU's as it is used.
        graph: whether each decoded token is one launch of a CUDA graph, if the library has been compiled for it;
            otherwise its kernels are launched one by one, with the same result.
        stream: the CUDA stream that the work goes to, as an integer such as `torch.cuda.Stream().cuda_stream`, which
            must outlive the model; None is the default stream. See `tvm_attn.runtime.stream`.
        draft: whether the artifact's draft is loaded too, if it has one; see `tvm_attn.runtime.speculation`.

    Raises:
        ArtifactError: the artifact is damaged, or not for this machine or TVM version.
        DeviceError: the device is unknown or absent, its memory is short, or an argument is out of range.
        TokenizerError: the artifact's tokenizer is malformed.
    """
    # Bad arguments are refused before anything is read.
    parse_device(device)
    thread_count(threads)
    return open_artifact(
        folder,
        lambda artifact: load_opened(
            artifact, device, threads=threads, max_batch=max_batch, graph=graph, stream=stream, draft=draft
        ),
    )


def load_opened(
    artifact: Artifact,
    device: str,
    *,
    threads: int | None = None,
    max_batch: int = 8,
    graph: bool = True,
    stream: int | None = None,
    draft: bool = True,
) -> Model:
    """As `load`, for an artifact that is already open."""
    import_tvm()
    artifact.check_versions()
    return Model(artifact, device, max_batch, graph=graph, stream=stream, threads=threads, draft=draft)
