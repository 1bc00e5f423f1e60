"""What a model needs of a GPU's memory, compared with what is free before anything is allocated.

Running out later would end the process in the middle of a request, or make TVM's pool free memory and try again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm_attn.errors import DeviceError
from tvm_attn.runtime.artifact import Artifact, Library
from tvm_attn.storage import TABLES, cache_row, numpy_dtype, scales_name

RESERVE = 64 << 20
"""Bytes left for the code of kernels, CUDA graphs, and what the driver keeps for both."""


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes on the device.

    Attributes:
        parameters: all packed parameters.
        packing: the largest parameter in its stored form, which is needed in addition while it is packed.
        cache_slot: one slot of the KV cache, all layers.
        activations: what the largest calls of the functions keep, including logits.
        max_batch: number of slots.
    """

    parameters: int
    packing: int
    cache_slot: int
    activations: int
    max_batch: int

    @property
    def fixed(self) -> int:
        """Everything except the KV cache. Packing is over when the first activations are allocated."""
        return self.parameters + max(self.packing, self.activations) + RESERVE

    @property
    def total(self) -> int:
        """Everything."""
        return self.fixed + self.max_batch * self.cache_slot

    def require(self, free: int, device: str) -> None:
        """Compares the needs with the bytes that are free on a device.

        Raises:
            DeviceError: more is needed than is free; the message lists the parts and says what to do.
        """
        if self.total <= free:
            return
        slots = (free - self.fixed) // self.cache_slot
        way_out = f"lower max_batch to {slots}" if slots > 0 else "free some, or build with --quant int8 or int4"
        parts = {
            "parameters": self.parameters,
            f"KV cache of {self.max_batch} slots": self.max_batch * self.cache_slot,
            "activations": max(self.packing, self.activations),
            "reserve": RESERVE,
        }
        listed = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
        message = (
            f"{device} has {_size(free)} of free memory but the model needs {_size(self.total)} ({listed}); {way_out}"
        )
        raise DeviceError(message)


def _size(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def memory_needs(artifact: Artifact, library: Library, max_batch: int) -> MemoryNeeds:
    """What an artifact's library needs with `max_batch` slots.

    Activations are those of prompts as long as the library was planned for, and of `max_batch` tokens of decode and its
    steps. At a time the planner keeps at most two tensors of the hidden width and three of the model's width, counted
    as float32; decode attention keeps the results of 16 parts of the keys, with their maxima and sums.
    """
    config = artifact.config
    stored = {name: (shape, numpy_dtype(dtype).itemsize) for name, (shape, dtype) in artifact.types.items()}
    padded = {name: library.vocabulary for table in TABLES for name in (table, scales_name(table))}
    parameters = sum(padded.get(name, shape[0]) * prod(shape[1:]) * size for name, (shape, size) in stored.items())
    width, dtype = cache_row(artifact.kv, config.head_dim)
    slot = 2 * config.n_layer * config.n_head * config.n_positions * width * numpy_dtype(dtype).itemsize
    row = 4 * (2 * config.n_inner + 3 * config.n_embd + library.vocabulary)
    decode_row = row + 4 * 16 * (config.n_embd + 4 * config.n_head)
    decode_rows = -(-max_batch // library.rows) * library.rows
    return MemoryNeeds(
        parameters=parameters,
        packing=max(prod(shape) * size for shape, size in stored.values()),
        cache_slot=slot,
        activations=row * library.max_prefill_rows + 2 * decode_row * decode_rows,
        max_batch=max_batch,
    )
