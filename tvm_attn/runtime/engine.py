"""The compiled model on a device: parameters, KV cache, and the calls of its functions.

Functions take rows in groups, as described in `tvm_attn.model.gpt2`; only this module builds them. It imports TVM's
runtime only and does not need the compiler.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

from tvm_attn.errors import ArtifactError, DeviceError
from tvm_attn.numbers import integer
from tvm_attn.runtime.artifact import Artifact, Library
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.graph import Steps
from tvm_attn.runtime.inputs import Inputs, Int32Array, in_groups
from tvm_attn.runtime.library import load_library
from tvm_attn.runtime.logits import DeviceLogits
from tvm_attn.runtime.logprobs import RowLogprobs
from tvm_attn.runtime.machine import thread_count
from tvm_attn.runtime.memory import memory_needs
from tvm_attn.runtime.stream import Stream
from tvm_attn.runtime.tensors import to_device
from tvm_attn.runtime.trace import Trace
from tvm_attn.runtime.worker import worker
from tvm_attn.storage import cache_row, numpy_dtype

P = ParamSpec("P")
R = TypeVar("R")
SetThreads = Callable[[int], None]
"""Sets the number of threads that compute what the calling thread calls in a library."""
_SCORED_ROWS = 256  # logits of so many rows are on the device while they are scored: 50 MB of GPT-2's
_BITS = {16: "uint16", 32: "uint32"}  # dtypes to copy values with: NumPy knows no bfloat16


def _in_turn(
    method: Callable[Concatenate[CompiledEngine, P], R],
) -> Callable[Concatenate[CompiledEngine, P], R]:
    """Makes a method run through `CompiledEngine.run`."""

    @functools.wraps(method)
    def call(engine: CompiledEngine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return engine.run(method, engine, *args, **kwargs)

    return call


class CompiledEngine:
    """A compiled model, its parameters packed on the device, and a KV cache of `max_batch` slots.

    Several threads may use it: calls take turns, also with those of other engines on the device.

    Args:
        artifact: the artifact that holds the parameters.
        library: the library of the artifact to run.
        device: TVM's device.
        max_batch: number of KV-cache slots.
        graph: whether `decode` runs the steps of the library, as CUDA graphs, where it has them.
        stream: of a CUDA device, as an integer; see `tvm_attn.runtime.stream`.
        threads: threads of a processor that compute a call; see `tvm_attn.runtime.machine.thread_count`.
        draft: whether the artifact's draft is loaded too, if it has one for the library.

    Attributes:
        library: the library that runs.
        writes: number of calls so far that may have changed the KV cache.
        draft: the artifact's draft on the same cache, if it has been loaded.

    Raises:
        ArtifactError: a file is damaged, or the library is not what the manifest says.
        DeviceError: an argument is out of range, the device lacks a feature, or memory is short.
    """

    def __init__(
        self,
        artifact: Artifact,
        library: Library,
        device: tvm.runtime.Device,
        max_batch: int,
        *,
        graph: bool = True,
        stream: int | None = None,
        threads: int | None = None,
        draft: bool = False,
    ) -> None:
        if stream is not None:
            if not device_class(library.device).has_streams:
                raise DeviceError(f"stream is for devices with streams, and must be None for {library.device}")
            stream = integer("stream", stream, 0, (1 << 64) - 1, DeviceError)
        self.config = artifact.config
        self.max_batch = integer("max_batch", max_batch, 1, library.max_batch, DeviceError)
        self.library, self._device = library, device
        self._threads = thread_count(threads)
        self._process = os.getpid()
        self._worker = worker("cpu" if library.device == "cpu" else f"{library.device}:{device.index}")
        self._stream = Stream(device, stream)
        self._logits_shape: tuple[int, ...] | None = None
        self._inputs = Inputs(device, self._stream.wait)
        self._wants_graph = graph
        self.writes = 0
        self.draft: CompiledEngine | None = None
        self.run(self._load, artifact, stream)
        if draft and (found := artifact.draft(library)) is not None:
            self.draft = self.run(self._with_weights, *found)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls a function while no other thread uses this engine or another one on the same device.

        The device's own thread makes the calls, in the order in which they were asked for; see
        `tvm_attn.runtime.worker`. On a CUDA device they still go to the stream that is current in this thread.

        Raises:
            DeviceError: the engine runs on a GPU, and this process was forked from the one that loaded it.
        """
        self._refuse_after_fork()
        return self._worker.run(self._stream.carry(function), *args, **kwargs)

    def post(self, function: Callable[[], object]) -> None:
        """As `run`, but does not wait for the call. The function must not raise."""
        self._refuse_after_fork()
        self._worker.post(self._stream.carry(function))

    def _refuse_after_fork(self) -> None:
        if self._process != os.getpid() and self.library.device != "cpu":
            message = f"{self.library.device} was in use when this process was forked, and drivers do not survive that"
            raise DeviceError(f'{message}; start processes with multiprocessing\'s "spawn", and load the model there')

    def _load(self, artifact: Artifact, stream: int | None) -> None:
        self._bind(*_load(artifact, self.library, self._device, stream))
        self._require_memory(artifact)
        self._params = self._pack(artifact)
        self._cache_row = cache_row(artifact.kv, self.config.head_dim)
        self._kv = self._new_cache(self.max_batch)
        self._stream.wait()

    @property
    def graph(self) -> bool:
        """Whether `decode` runs the library's steps."""
        return self._steps is not None

    def on(self, machine: VirtualMachine, set_threads: SetThreads | None = None) -> CompiledEngine:
        """An engine with the same parameters and cache that calls another build of the same functions."""
        engine = copy.copy(self)
        engine._bind(machine, set_threads)
        return engine

    def _with_weights(self, artifact: Artifact, library: Library) -> CompiledEngine:
        """An engine with the parameters of another artifact and the same cache."""
        engine = self.on(*_load(artifact, library, self._device, None))
        engine.library = library
        engine._params = engine._pack(artifact)
        return engine

    def _bind(self, machine: VirtualMachine, set_threads: SetThreads | None) -> None:
        self._vm, self._set_threads = machine, set_threads
        has = machine.module.implements_function
        self._groups_alone = {kind for kind in ("decode", "step") if has(f"{kind}_group")}
        self._steps = None
        if self._wants_graph and has("step"):
            inputs = Inputs(self._device, self._stream.wait)
            self._steps = Steps(machine, inputs, self._stream, self.config.vocab_size, self.max_batch, self.logprobs)

    def _call(self, name: str, *rows: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        """Calls a function of the library that takes the KV cache and the parameters."""
        self.writes += 1
        return self._run(name, *rows, self._kv, self._params)

    def _run(self, name: str, *arguments: Any) -> Any:
        if self._set_threads is not None:
            self._set_threads(self._threads)
        return self._stream.run(self._vm[name], *arguments)

    def _require_memory(self, artifact: Artifact) -> None:
        free = device_class(self.library.device).free_memory(self._device)
        if free is not None:
            needs = memory_needs(artifact, self.library, self.max_batch)
            needs.require(free, f"{self.library.device}:{self._device.index}")

    def _pack(self, artifact: Artifact) -> tvm.runtime.Object:
        """The parameters in the library's layout, read and packed one at a time."""
        parameters, names = artifact.parameters, self.library.parameters
        failure: list[ArtifactError] = []

        def get(index: int, _name: str) -> tvm.runtime.Tensor:
            try:
                return to_device(parameters.read(names[index]), self._device)
            except ArtifactError as error:
                failure.append(error)
                raise

        try:
            return self._run("transform_params", get)
        except Exception as error:
            # The error crosses TVM's virtual machine, which may wrap it.
            raise (failure[0] if failure else _misfit(artifact, self.library, error)) from error
        finally:
            parameters.close()

    def _new_cache(self, slots: int) -> Sequence[tvm.runtime.Tensor]:
        """One tensor per layer, in the TVM array that calls take.

        The tensors are not filled: nothing reads beyond a sequence's length.
        """
        config, (width, dtype) = self.config, self._cache_row
        shape = (slots, 2, config.n_head, config.n_positions, width)
        try:
            caches: Sequence[tvm.runtime.Tensor] = tvm_ffi.convert(
                [tvm.runtime.empty(shape, dtype, self._device) for _ in range(config.n_layer)]
            )
            return caches
        except Exception as error:
            size = numpy_dtype(dtype).itemsize * int(np.prod(shape)) * config.n_layer
            message = f"no memory for a KV cache of {size / 2**30:.1f} GiB; lower max_batch (now {self.max_batch})"
            raise DeviceError(message) from error

    @property
    def max_prefill_rows(self) -> int:
        """The most tokens that one call of the library takes, at least a context."""
        return self.library.max_prefill_rows

    @property
    def verified_rows(self) -> int:
        """How many tokens of one sequence `decode` takes in a call, with the bits of one token a call; 1 if no more."""
        return self.library.rows if device_class(self.library.device).in_host_memory else 1

    @property
    def prefill_chunk(self) -> int:
        """Tokens of prompts that a scheduler computes between two steps of running sequences."""
        return device_class(self.library.device).prefill_chunk

    @_in_turn
    def prefill(
        self, prompts: Sequence[Int32Array], slots: Sequence[int], starts: Sequence[int] | None = None
    ) -> DeviceLogits:
        """Runs prompts, or parts of prompts, into their slots.

        On processors the results do not depend on the parts, bit by bit.

        Args:
            prompts: int32 arrays (T_b,), 1 <= T_b <= n_positions - starts[b]; lengths may differ.
            slots: the slot of each prompt, all different; it is filled at positions starts[b] .. starts[b] + T_b - 1.
            starts: the position of each prompt's first token, all 0 by default; the slot must hold what is before it.

        Returns:
            Logits of each prompt's last token.
        """
        starts = [0] * len(prompts) if starts is None else starts
        if prompts and not any(starts) and all(len(prompt) == 1 for prompt in prompts):  # decode needs less padding
            token_ids, positions = np.concatenate(prompts).astype(np.int32), np.zeros(len(prompts), np.int32)
            return self.decode(token_ids, np.asarray(slots, np.int32), positions)
        parts = []
        for first, last in self._calls(prompts):
            rows = self._prompt_rows(prompts[first:last], slots[first:last], starts[first:last])
            lengths = np.array([len(prompt) for prompt in prompts[first:last]], np.int32)
            ends = {
                "last_rows": self._groups(np.cumsum(lengths, dtype=np.int32) - 1, 0),
                "last_positions": self._groups(np.asarray(starts[first:last], np.int32) + lengths - 1, -1),
                "last_slots": self._groups(np.asarray(slots[first:last], np.int32), 0),
            }
            tensors = [self._inputs.write(name, values) for name, values in ends.items()]
            parts.append((self._call("prefill", *rows, *tensors), last - first))
        return self._device_logits(parts)

    @_in_turn
    def logits(self, prompts: Sequence[Int32Array], slots: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """As `prefill`, but returns the logits of every token: one (T_b, V) float32 array per prompt."""
        results: list[npt.NDArray[np.float32]] = []
        for (first, last), tensor, _ in self._all_logits(prompts, slots):
            flat = self._stream.read(tensor)[:, : self.config.vocab_size]
            ends = np.cumsum([len(prompt) for prompt in prompts[first:last]])
            results += np.split(flat[: ends[-1]], ends[:-1])
        return results

    @_in_turn
    def device_logits(self, prompts: Sequence[Int32Array], slots: Sequence[int]) -> DeviceLogits:
        """As `logits`, but leaves them on the device: one row per token, the prompts one after the other."""
        return self._device_logits([(tensor, rows) for _, tensor, rows in self._all_logits(prompts, slots)])

    def _all_logits(
        self, prompts: Sequence[Int32Array], slots: Sequence[int]
    ) -> Iterator[tuple[tuple[int, int], tvm.runtime.Tensor, int]]:
        """Runs prompts; gives for each call their range, the logits (g, R, V') of all tokens, and the token count."""
        for first, last in self._calls(prompts):
            rows = self._prompt_rows(prompts[first:last], slots[first:last], [0] * (last - first))
            self._drop_unused(rows[0].shape)
            count = sum(len(prompt) for prompt in prompts[first:last])
            yield (first, last), self._call("logits", *rows), count

    @_in_turn
    def decode(
        self, token_ids: Int32Array, slots: Int32Array, positions: Int32Array, *, ahead: bool = False
    ) -> DeviceLogits:
        """Runs one token per row.

        Args:
            token_ids, slots, positions: int32 (B,); token b is written at `positions[b]` of its slot and attends to all
                positions up to it, also to those that this call writes: rows may be of one slot, at consecutive
                positions. On processors that gives the bits of one token a call.
            ahead: whether the next call will probably be for the same sequences and the ids of the largest logits, at
                positions inside the context: where the library has steps, that step starts at once, and of these logits
                only `argmax` can be read.

        Returns:
            Logits that follow each token; those of a step are a `StepLogits`, which the next step overwrites.
        """
        count, kind = len(token_ids), "step" if self.graph else "decode"
        if count == 1:
            name, shape = f"{kind}_one", (1, 1)
        else:
            rows = self.library.rows
            shape = (-(-count // rows), rows)
            name = f"{kind}_group" if shape[0] == 1 and kind in self._groups_alone else kind
        if self._steps is not None:
            self.writes += 1
            rest = self._kv, self._params
            return self._steps.run(name, shape, token_ids, positions, slots, rest, writes=self.writes, ahead=ahead)
        values = {"token_ids": (token_ids, 0), "positions": (positions, -1), "slots": (slots, 0)}
        tensors = [self._inputs.write(key, in_groups(array, shape, fill)) for key, (array, fill) in values.items()]
        return self._device_logits([(self._call(name, *tensors), count)])

    @_in_turn
    def trace(self, prompt: Int32Array) -> Trace:
        """Runs one prompt, (T,) int32, outside of all slots and keeps what each layer sees."""
        caches = self._new_cache(1)
        rows = self._prompt_rows([prompt], [0], [0])
        return Trace(self, prompt, self._run("trace", *rows, caches, self._params), caches)

    @_in_turn
    def attention_weights(
        self, layer: int, queries: tvm.runtime.Tensor, cache: tvm.runtime.Tensor
    ) -> npt.NDArray[np.float32]:
        """Attention weights (H, g R, g R) of a layer's queries (g, R, E) over slot 0 of a cache."""
        scale, config = self.config.attention_scale(layer), self.config
        first = next(other for other in range(config.n_layer) if config.attention_scale(other) == scale)
        slot = self._inputs.write("slot", np.zeros(1, np.int32))
        weights = self._run(f"attention_weights_{first}", queries, cache, slot)
        return self._stream.read(weights).reshape(weights.shape)

    @_in_turn
    def lens(self, x: tvm.runtime.Tensor, rows: int) -> DeviceLogits:
        """Logits of the first rows of x (g, R, E), as if it came after the last layer."""
        return self._device_logits([(self._run("lens", x, self._params), rows)])

    @_in_turn
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of a slot's cache to another slot."""
        self.writes += 1
        if device_class(self.library.device).in_host_memory:
            for cache in self._kv:
                array = np.from_dlpack(cache._create_view(cache.shape, _BITS[cache.dtype.bits]))
                array[target, :, :, :length] = array[source, :, :, :length]
            return
        # A slot is one run of memory; its first positions are not. TVM copies on the default stream.
        self._stream.wait()
        for cache in self._kv:
            shape = cache.shape[1:]
            size = int(np.prod(shape)) * cache.dtype.bits // 8
            new, old = (
                cache._create_view(shape, cache.dtype, relative_byte_offset=slot * size) for slot in (target, source)
            )
            new.copyfrom(old)
        self._device.sync()

    def _drop_unused(self, shape: tuple[int, ...]) -> None:
        """Empties TVM's pool when the logits of all tokens change their size.

        They are the only large tensor that is not planned for the longest prompt; a pool that kept one for each length
        would fill a GPU.
        """
        if self._logits_shape not in (None, shape) and not device_class(self.library.device).in_host_memory:
            tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()
        self._logits_shape = shape

    def _device_logits(self, parts: Sequence[tuple[tvm.runtime.Tensor, int]]) -> DeviceLogits:
        return DeviceLogits(self._stream, self.config.vocab_size, self.argmax, self.logprobs, parts)

    @_in_turn
    def argmax(self, logits: tvm.runtime.Tensor) -> Int32Array:
        """argmax of logits (g, R, V') over the vocabulary, as (g * R,) int32."""
        name = "argmax_one" if tuple(logits.shape[:2]) == (1, 1) else "argmax"
        return self._stream.read(self._run(name, logits))

    @_in_turn
    def logprobs(self, logits: tvm.runtime.Tensor, token_ids: Int32Array, count: int) -> RowLogprobs:
        """Log-probabilities of the first B rows of logits (g, R, V'), in nats.

        Args:
            logits: on the device.
            token_ids: int32 (B,), a token for each row.
            count: how many of the most likely tokens are wanted, 0 .. `MOST_LOGPROBS`.
        """
        rows = int(np.prod(logits.shape[:-1]))
        flat = logits._create_view((rows, int(logits.shape[-1])))
        chosen = self._inputs.write("chosen", in_groups(token_ids, (1, rows), -1).reshape(rows))
        wanted = len(token_ids)
        results = [*self._run("exp_sums", flat, chosen), *(self._run("top_logits", flat) if count else ())]
        arrays = [self._stream.read(result).reshape(result.shape)[:wanted] for result in results]
        distances, totals, *best = arrays
        ids, values = (array[:, :count] for array in best) if best else (None, None)
        return RowLogprobs.from_sums(distances, totals, ids, values)

    @_in_turn
    def score(
        self,
        prompts: Sequence[Int32Array],
        slots: Sequence[int],
        starts: Sequence[int],
        targets: Sequence[Int32Array],
        count: int = 0,
    ) -> list[RowLogprobs]:
        """As `prefill`, but returns log-probabilities of the token that follows each token.

        The logits on the device are those of a part of the prompts at a time.

        Args:
            prompts, slots, starts: as in `prefill`.
            targets: int32 arrays (T_b,), the token after each of prompt b.
            count: how many of the most likely tokens are wanted too.

        Returns:
            T_b rows for each prompt.
        """
        found: list[list[RowLogprobs]] = [[] for _ in prompts]
        for parts in _parts([len(prompt) for prompt in prompts], _SCORED_ROWS):
            tokens = [prompts[b][first:last] for b, first, last in parts]
            rows = self._prompt_rows(
                tokens, [slots[b] for b, _, _ in parts], [starts[b] + first for b, first, _ in parts]
            )
            self._drop_unused(rows[0].shape)
            wanted = np.concatenate([targets[b][first:last] for b, first, last in parts])
            logprobs = self.logprobs(self._call("logits", *rows), wanted, count)
            row = 0
            for b, first, last in parts:
                found[b].append(logprobs.rows(row, row := row + last - first))
        return [RowLogprobs.join(rows) for rows in found]

    def _calls(self, prompts: Sequence[Int32Array]) -> list[tuple[int, int]]:
        """Ranges of prompts that fit one call, in order."""
        ranges: list[tuple[int, int]] = []
        rows = 0
        for index, prompt in enumerate(prompts):
            if ranges and rows + len(prompt) <= self.library.max_prefill_rows:
                ranges[-1] = (ranges[-1][0], index + 1)
                rows += len(prompt)
            else:
                ranges.append((index, index + 1))
                rows = len(prompt)
        return ranges

    def _prompt_rows(
        self, prompts: Sequence[Int32Array], slots: Sequence[int], starts: Sequence[int]
    ) -> list[tvm.runtime.Tensor]:
        """token_ids, positions, slots and sequences of prompts, one after the other, each from its start on."""
        lengths = [len(prompt) for prompt in prompts]
        positions = np.concatenate(
            [np.arange(start, start + length, dtype=np.int32) for start, length in zip(starts, lengths, strict=True)]
        )
        first_rows = np.cumsum([0, *lengths[:-1]])
        sequences = np.array(list(zip(slots, first_rows, lengths, starts, strict=True)), np.int32)
        arguments = {
            "token_ids": self._groups(np.concatenate(prompts).astype(np.int32), 0),
            "positions": self._groups(positions, -1),
            "slots": self._groups(np.repeat(np.asarray(slots, np.int32), lengths), 0),
            "sequences": sequences,
        }
        return [self._inputs.write(name, values) for name, values in arguments.items()]

    def _groups(self, values: Int32Array, fill: int) -> Int32Array:
        """(n,) int32 as whole groups (g, R), padded with `fill`; a new array."""
        rows = self.library.rows
        return in_groups(values, (-(-len(values) // rows), rows), fill)


def _parts(lengths: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Calls of at most `most` rows that together take sequences of these lengths: (sequence, first, last) of each
    part, those of one sequence in order and at most one a call."""
    call: list[tuple[int, int, int]] = []
    room = most
    for sequence, length in enumerate(lengths):
        first = 0
        while first < length:
            last = min(first + room, length)
            call.append((sequence, first, last))
            room, first = room - (last - first), last
            if not room:
                yield call
                call, room = [], most
    if call:
        yield call


def _load(
    artifact: Artifact, library: Library, device: tvm.runtime.Device, stream: int | None
) -> tuple[VirtualMachine, SetThreads | None]:
    """The library's functions, and what sets its number of threads; None on GPUs."""
    # TVM's pool is one for all models of a device and knows no streams: it would give memory that one stream still
    # reads to a model on another. Freeing without a pool waits for the device.
    allocator = None if stream is None else "naive"
    content = artifact.read_array(library.file)
    try:
        module = load_library(content, library.file)
        device_class(library.device).require(module, device.index, library.file)
        machine = VirtualMachine(module, device, allocator)
        identity = str(machine["identity"]())
        set_threads = threads_setter(module) if library.device == "cpu" else None
    except DeviceError:
        raise
    except Exception as error:
        raise _misfit(artifact, library, error) from error
    artifact.check_identity(library, identity)
    return machine, set_threads


def threads_setter(module: tvm.runtime.Module) -> SetThreads:
    """`set_threads` of a library for processors."""
    found: SetThreads = module.get_function("set_threads", query_imports=True)
    return found


def _misfit(artifact: Artifact, library: Library, error: Exception) -> ArtifactError:
    cause = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return artifact.error(f"{library.file} cannot be run ({cause})")
