"""The package as a backend of ONNX: https://onnx.ai/onnx/api/backend.html.

    prepared = CpuBackend.prepare(model)
    outputs = prepared.run(inputs)

`tests/onnx/test_backend.py` runs ONNX's own node tests with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.backend.base import Backend, BackendRep

from tvm_attn.errors import OnnxError
from tvm_attn.onnx.session import Session, compile


class Prepared(BackendRep):
    """A compiled graph.

    Args:
        session: the graph.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, inputs: Sequence[Any], **_: Any) -> tuple[np.ndarray, ...]:
        """The outputs for inputs in the graph's order: arrays or TensorProtos."""
        return self._session(*(numpy_helper.to_array(i) if isinstance(i, TensorProto) else i for i in inputs))


class CpuBackend(Backend):
    """Graphs on the processor."""

    target = "cpu"

    @classmethod
    def prepare(cls, model: ModelProto, device: str = "CPU", **_: Any) -> Prepared:
        """Compiles a graph; raises as `tvm_attn.onnx.compile` does."""
        return Prepared(compile(model, cls.target))

    @classmethod
    def run_model(cls, model: ModelProto, inputs: Sequence[Any], device: str = "CPU", **_: Any) -> tuple[Any, ...]:
        """Compiles a graph and runs it once."""
        return cls.prepare(model).run(inputs)

    @classmethod
    def run_node(
        cls, node: NodeProto, inputs: Sequence[Any], device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Compiles a node as a graph of its own, and runs it once."""
        arrays = [np.asarray(value) for value in inputs]
        names = [name for name in node.input if name]
        declared = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, arrays, strict=True)
        ]
        results = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        versions = [helper.make_opsetid("", version)] if (version := kwargs.get("opset_version")) else None
        return cls.run_model(
            helper.make_model(helper.make_graph([node], "node", declared, results), opset_imports=versions), arrays
        )

    @classmethod
    def is_compatible(cls, model: ModelProto, device: str = "CPU", **_: Any) -> bool:
        """Whether a graph can be compiled."""
        try:
            compile(model, cls.target)
        except OnnxError:
            return False
        return True

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether `device`, where inputs and outputs are, is this machine's memory."""
        return device == "CPU"


class VulkanBackend(CpuBackend):
    """Graphs on the first Vulkan device; inputs and outputs are in this machine's memory."""

    target = "vulkan"
