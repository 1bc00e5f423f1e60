"""A peer of `python -m benchmarks.compare` on the same GPU as our model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.systems import make_peer
from benchmarks.peers.client import PeerUnavailable
from tvm_attn.benchmark.device import torch_device
from tvm_attn.benchmark.ours import CompiledSystem
from tvm_attn.benchmark.system import Case, Float32Array, Int32Array, System
from tvm_attn.model.params import effective_params


class GpuPeer:
    """A peer in this process, on the same GPU as our model, with the interface of `PeerProcess`.

    Args:
        name: a name in `GPU_PEERS`.
        precision: one of PyTorch's precisions.
        ours: our model, whose weights it uses.

    Raises:
        PeerUnavailable: PyTorch or one of its dependencies is missing or fails.
    """

    def __init__(self, name: str, precision: str, ours: CompiledSystem) -> None:
        self._label = name
        read, quantization = ours.artifact.parameters.read, ours.artifact.quantization
        self._system: System = self._try(
            lambda: make_peer(
                name,
                ours.config,
                lambda: effective_params(ours.config, read, quantization),
                precision,
                torch_device(ours.device),
                ours.max_batch,
            )
        )
        ours.artifact.parameters.close()
        self.name, self.version, self.precision = self._system.name, self._system.version, precision

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever PyTorch raises is the reason for leaving the peer out
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise PeerUnavailable(f"{self._label}: {cause}") from error

    def supports(self, case: Case) -> bool:
        """See `System.supports`."""
        return self._system.supports(case)

    def fill(self, case: Case) -> None:
        """See `System.fill`."""
        self._try(lambda: self._system.fill(case))

    def time(self, case: Case, seconds: float) -> list[float]:
        """See `System.time`."""
        times: list[float] = self._try(lambda: self._system.time(case, seconds))
        return times

    def logits(self, ids: Int32Array) -> dict[str, Float32Array]:
        """See `System.logits`."""
        logits: dict[str, Float32Array] = self._try(lambda: self._system.logits(ids))
        return logits
