"""Other runtimes on the same weights; one file each, which runs in its own process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PeerInfo:
    """A runtime to compare with.

    Attributes:
        name: its name in `--against`, and the module in this package that runs it.
        modules: modules that its process must be able to import.
        install: the command that installs them.
        precisions: the precisions that it can run here; the first is the default if none is like the artifact's.
    """

    name: str
    modules: tuple[str, ...]
    install: str
    precisions: tuple[str, ...]

    def precision(self, wanted: str | None, ours: str) -> str | None:
        """The precision to run: `wanted`, or None if the peer lacks it; by default the nearest to `ours`."""
        if wanted is not None:
            return wanted if wanted in self.precisions else None
        nearest = [ours, _SIMILAR.get(ours), self.precisions[0]]
        return next(precision for precision in nearest if precision in self.precisions)


_SIMILAR = {"int8": "q8_0", "int4": "q4_0"}
"""Other runtimes' names for formats like ours."""

PEERS = {
    peer.name: peer
    for peer in (
        PeerInfo(
            "torch", ("torch", "transformers"), "pip install torch transformers", ("float32", "bfloat16", "float16")
        ),
        PeerInfo("onnxruntime", ("onnx", "onnxruntime"), "pip install onnx onnxruntime", ("float32",)),
        PeerInfo("openvino", ("openvino",), "pip install openvino", ("float32", "bfloat16")),
        PeerInfo("ctranslate2", ("ctranslate2",), "pip install ctranslate2", ("float32", "int8")),
        PeerInfo(
            "llamacpp",
            ("gguf", "llama_cpp"),
            "pip install gguf llama-cpp-python",
            ("float32", "float16", "bfloat16", "q8_0", "q4_0"),
        ),
    )
}
"""Every peer on the processor by name."""


@dataclass(frozen=True)
class TorchPeer:
    """A way to run the model in PyTorch on a GPU, in our process.

    Attributes:
        name: its name in `--against`.
        description: its name in tables.
        backend: backend of attention, see `TorchModel`.
        captured: whether decode steps are CUDA graphs.
        compiled: whether blocks are compiled with torch.compile.
    """

    name: str
    description: str
    backend: str | None = None
    captured: bool = False
    compiled: bool = False


GPU_PEERS = {
    peer.name: peer
    for peer in (
        TorchPeer("torch", "PyTorch, eager"),
        TorchPeer("torch-flash", "PyTorch, eager, SDPA's flash backend", backend="flash"),
        TorchPeer("torch-cudnn", "PyTorch, eager, SDPA's cuDNN backend", backend="cudnn"),
        TorchPeer("torch-graph", "PyTorch, decode as CUDA graphs", captured=True),
        TorchPeer("torch-compile", "PyTorch, torch.compile and CUDA graphs", captured=True, compiled=True),
        TorchPeer("transformers", "transformers, eager"),
    )
}
"""Every peer on a GPU by name."""
