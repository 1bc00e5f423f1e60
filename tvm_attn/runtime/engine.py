"""The compiled model on a device: parameters, KV cache, and the calls of its functions.

Rows are handed to the functions in groups, as `tvm_attn.model.gpt2` says; this is the only place that builds them.
Imports TVM's runtime only; its compiler need not be there.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tvm
from tvm.runtime.vm import VirtualMachine

from tvm_attn.errors import ArtifactError, DeviceError
from tvm_attn.runtime.artifact import Artifact, Library
from tvm_attn.storage import numpy_dtype
from tvm_attn.vulkan import require_device

Int32Array = npt.NDArray[np.int32]


class DeviceLogits:
    """Next-token logits of some sequences, in one tensor (g, R, V') a call of the model."""

    def __init__(self, engine: CompiledEngine, parts: list[tuple[tvm.runtime.Tensor, int]]) -> None:
        self._engine, self._parts = engine, parts

    def numpy(self) -> npt.NDArray[np.float32]:
        """The logits (B, V), float32."""
        vocabulary = self._engine.config.vocab_size
        rows = [_flat_rows(tensor)[:count, :vocabulary] for tensor, count in self._parts]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def argmax(self) -> Int32Array:
        """The id of the largest logit of each row, (B,) int32; -1 for a row that holds NaN."""
        ids = [self._engine.argmax(tensor)[:count] for tensor, count in self._parts]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)


def _flat_rows(tensor: tvm.runtime.Tensor) -> np.ndarray:
    """A (g, R, ...) tensor on the host as (g * R, ...); on the CPU a view, without a copy."""
    array = np.from_dlpack(tensor) if tensor.device == tvm.cpu(0) else tensor.numpy()
    return array.reshape(-1, *array.shape[2:])


class CompiledEngine:
    """A compiled model, its parameters packed on the device, and a KV cache of `max_batch` slots.

    Args:
        artifact: where the parameters come from.
        library: the library of the artifact to run.
        device: TVM's device.
        max_batch: number of KV-cache slots.

    Raises:
        ArtifactError: a file is damaged, or the library is not what the manifest says.
        DeviceError: `max_batch` is out of range, the device lacks a feature, or memory is short.
    """

    def __init__(self, artifact: Artifact, library: Library, device: tvm.runtime.Device, max_batch: int) -> None:
        if not (isinstance(max_batch, int) and 1 <= max_batch <= library.max_batch):
            raise DeviceError(f"max_batch must be 1 to {library.max_batch}, not {max_batch!r}")
        self.config = artifact.config
        self.max_batch = max_batch
        self._library, self._device = library, device
        # The content is checked and then loaded by name: TVM loads libraries from files only.
        artifact.read(library.file)
        self._vm = _virtual_machine(artifact, library, device)
        self._params = self._pack(artifact)
        self._kv = self._new_cache(artifact.dtype)

    def on(self, machine: VirtualMachine) -> CompiledEngine:
        """An engine with the same parameters and cache that calls another build of the same functions."""
        engine = copy.copy(self)
        engine._vm = machine
        return engine

    def _pack(self, artifact: Artifact) -> tvm.runtime.Object:
        """The parameters in the library's layout; they are read and packed one at a time."""
        parameters, names = artifact.parameters, self._library.parameters
        failure: list[ArtifactError] = []

        def get(index: int, _name: str) -> tvm.runtime.Tensor:
            try:
                return _to_device(parameters.read(names[index]), self._device)
            except ArtifactError as error:
                failure.append(error)
                raise

        try:
            return self._vm["transform_params"](get)
        except Exception as error:
            # The error crosses TVM's virtual machine, which may wrap it.
            raise (failure[0] if failure else _misfit(artifact, self._library, error)) from error
        finally:
            parameters.close()

    def _new_cache(self, dtype: str) -> tuple[tvm.runtime.Tensor, ...]:
        """One tensor a layer. Not filled: what lies beyond a sequence's length is never used."""
        config = self.config
        shape = (self.max_batch, 2, config.n_head, config.n_positions, config.head_dim)
        try:
            return tuple(tvm.runtime.empty(shape, dtype, self._device) for _ in range(config.n_layer))
        except Exception as error:
            size = numpy_dtype(dtype).itemsize * int(np.prod(shape)) * config.n_layer
            message = f"no memory for a KV cache of {size / 2**30:.1f} GiB; lower max_batch (now {self.max_batch})"
            raise DeviceError(message) from error

    def prefill(self, prompts: Sequence[Int32Array], slots: Sequence[int]) -> DeviceLogits:
        """Runs prompts into their slots.

        Args:
            prompts: int32 arrays (T_b,), 1 <= T_b <= n_positions, lengths may differ.
            slots: the slot of each; it is filled at positions 0 .. T_b - 1.

        Returns:
            Logits of each prompt's last token.
        """
        if prompts and all(len(prompt) == 1 for prompt in prompts):  # less padding than as prompts
            token_ids, positions = np.concatenate(prompts).astype(np.int32), np.zeros(len(prompts), np.int32)
            return self.decode(token_ids, np.asarray(slots, np.int32), positions)
        parts = []
        for first, last in self._calls(prompts):
            rows = self._prompt_rows(prompts[first:last], slots[first:last])
            ends = np.cumsum([len(prompt) for prompt in prompts[first:last]]) - 1
            last_rows = self._groups(ends.astype(np.int32), fill=0)
            parts.append((self._vm["prefill"](*rows, last_rows, self._kv, self._params), last - first))
        return DeviceLogits(self, parts)

    def logits(self, prompts: Sequence[Int32Array], slots: Sequence[int]) -> list[npt.NDArray[np.float32]]:
        """As `prefill`, but returns the logits of every token: one (T_b, V) float32 array a prompt."""
        results = []
        for first, last in self._calls(prompts):
            rows = self._prompt_rows(prompts[first:last], slots[first:last])
            flat = _flat_rows(self._vm["logits"](*rows, self._kv, self._params))[:, : self.config.vocab_size]
            ends = np.cumsum([len(prompt) for prompt in prompts[first:last]])
            results += np.split(flat[: ends[-1]], ends[:-1])
        return results

    def decode(self, token_ids: Int32Array, slots: Int32Array, positions: Int32Array) -> DeviceLogits:
        """Runs one token a sequence.

        Args:
            token_ids, slots, positions: int32 (B,); token b is written at `positions[b]` of its slot and attends to all
                positions up to it.

        Returns:
            Logits that follow each token.
        """
        if len(token_ids) == 1:
            rows = [_host_tensor(values.reshape(1, 1), self._device) for values in (token_ids, positions, slots)]
            return DeviceLogits(self, [(self._vm["decode_one"](*rows, self._kv, self._params), 1)])
        rows = [self._groups(token_ids, 0), self._groups(positions, -1), self._groups(slots, 0)]
        return DeviceLogits(self, [(self._vm["decode"](*rows, self._kv, self._params), len(token_ids))])

    def argmax(self, logits: tvm.runtime.Tensor) -> Int32Array:
        """argmax over the vocabulary of logits (g, R, V'), as (g * R,) int32."""
        name = "argmax_one" if tuple(logits.shape[:2]) == (1, 1) else "argmax"
        return _flat_rows(self._vm[name](logits))

    def _calls(self, prompts: Sequence[Int32Array]) -> list[tuple[int, int]]:
        """Ranges of prompts that fit one call, in order."""
        ranges: list[tuple[int, int]] = []
        rows = 0
        for index, prompt in enumerate(prompts):
            if ranges and rows + len(prompt) <= self._library.max_prefill_rows:
                ranges[-1] = (ranges[-1][0], index + 1)
                rows += len(prompt)
            else:
                ranges.append((index, index + 1))
                rows = len(prompt)
        return ranges

    def _prompt_rows(self, prompts: Sequence[Int32Array], slots: Sequence[int]) -> list[tvm.runtime.Tensor]:
        """token_ids, positions, slots and sequences of whole prompts, one after the other."""
        lengths = [len(prompt) for prompt in prompts]
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        starts = np.cumsum([0, *lengths[:-1]])
        sequences = np.array(list(zip(slots, starts, lengths, [0] * len(lengths), strict=True)), np.int32)
        return [
            self._groups(np.concatenate(prompts).astype(np.int32), 0),
            self._groups(positions, -1),
            self._groups(np.repeat(np.asarray(slots, np.int32), lengths), 0),
            _host_tensor(sequences, self._device),
        ]

    def _groups(self, values: Int32Array, fill: int) -> tvm.runtime.Tensor:
        """(n,) int32 as whole groups (g, R), padded with `fill`."""
        rows = self._library.rows
        groups = np.full((-(-len(values) // rows), rows), fill, np.int32)
        groups.reshape(-1)[: len(values)] = values
        return _host_tensor(groups, self._device)


def _host_tensor(array: np.ndarray, device: tvm.runtime.Device) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(array, device=device)


def _to_device(array: np.ndarray, device: tvm.runtime.Device) -> tvm.runtime.Tensor:
    """A tensor with the array's content; TVM's own copy of bfloat16 arrays goes through two more buffers."""
    tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
    if array.dtype.kind in "fiu":
        tensor.copyfrom(array)
    else:
        tensor._create_view(array.shape, "uint16").copyfrom(array.view(np.uint16))
    return tensor


def _virtual_machine(artifact: Artifact, library: Library, device: tvm.runtime.Device) -> VirtualMachine:
    try:
        module = tvm.runtime.load_module(str(artifact.folder / library.file))
        if library.device == "vulkan":
            require_device(module, device.index)
        machine = VirtualMachine(module, device)
        identity = str(machine["identity"]())
    except DeviceError:
        raise
    except Exception as error:
        raise _misfit(artifact, library, error) from error
    artifact.check_identity(library, identity)
    return machine


def _misfit(artifact: Artifact, library: Library, error: Exception) -> ArtifactError:
    cause = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return ArtifactError(f"artifact {artifact.folder}: {library.file} cannot be run ({cause}); build it again")
