"""ONNX's own node tests, of onnx 1.23.2: attention, and the operators that attention blocks need."""

import re
import warnings
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from tests.kernels.devices import vulkan_devices
from tvm_attn.errors import OnnxError
from tvm_attn.onnx.backend import CpuBackend, VulkanBackend
from tvm_attn.onnx.operators import OPERATORS

TESTED = {*OPERATORS, "RotaryEmbedding"}
"""RotaryEmbedding is replaced by the function that defines it."""

REFUSED = {
    r"test_(cast|castlike)_.*(FLOAT8|FLOAT4|INT4|INT2).*": "a dtype of less than 16 bits",
    r"test_training_dropout.*": "Dropout in training",
    r"test_equal_string.*": "strings",
    r"test_identity_(sequence|opt)": "a value that is no tensor",
    r"test_mod_(mixed_sign_float|float|int64_fmod).*": "Mod of floats or with fmod",
    r"test_(edge|reflect|wrap)_pad": "Pad with other numbers than a constant",
}
"""Cases of these operators that do not run, and why."""

ROUNDED = {
    "test_attention_4d_causal_fp16_expanded": "the graph rounds to float16 between its operators; two numbers differ "
    "by two units in the last place, as expected is what NumPy's order of sums gives",
}
"""Cases that run and are not within ONNX's bound, and why."""


@cache
def cases() -> dict[str, Any]:
    """The tests whose graphs consist of the tested operators."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # from ONNX's own computation of what is expected
        loaded = load_model_tests(kind="node")
    return {case.name: case for case in loaded if {node.op_type for node in case.model.graph.node} <= TESTED}


def names(refused: bool = False, expanded: bool = False) -> list[str]:
    """Names of cases: those that run or those that are refused; with the operators' definitions as graphs or not."""
    pattern = re.compile("|".join(REFUSED))
    return [
        name
        for name in cases()
        if bool(pattern.fullmatch(name)) == refused and (refused or ("_expanded" in name) == expanded)
    ]


def check(backend: type[CpuBackend], name: str) -> None:
    """Runs a case as ONNX's runner does."""
    case = cases()[name]
    prepared = backend.prepare(case.model)
    for inputs, expected in case.data_sets:
        arrays = [numpy_helper.to_array(e) if isinstance(e, onnx.TensorProto) else np.asarray(e) for e in expected]
        Runner.assert_similar_outputs(arrays, list(prepared.run(inputs)), case.rtol, case.atol)


def test_the_release_of_onnx() -> None:
    """The meaning of operators changes between releases, with and without a new opset."""
    assert onnx.__version__ == "1.23.2"
    attention = [name for name in names() if name.startswith("test_attention")]
    assert len(attention) == 93 and not any("attention" in name for name in names(refused=True))


def of_attention(name: str) -> bool:
    """Whether a case is of Attention or of an operator that attention blocks have beside pointwise ones."""
    near = {
        "Attention",
        "Gelu",
        "LayerNormalization",
        "RMSNormalization",
        "RotaryEmbedding",
        "Softmax",
        "TensorScatter",
    }
    return not near.isdisjoint(node.op_type for node in cases()[name].model.graph.node)


@pytest.mark.parametrize("name", [name for name in names() if of_attention(name)])
def test_attention(name: str) -> None:
    check(CpuBackend, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names() if not of_attention(name)])
def test_node(name: str) -> None:
    check(CpuBackend, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", names(expanded=True))
def test_definition(name: str) -> None:
    if name in ROUNDED:
        pytest.xfail(ROUNDED[name])
    check(CpuBackend, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_vulkan(name: str) -> None:
    if not vulkan_devices():
        pytest.skip("no Vulkan device")
    check(VulkanBackend, name)


@pytest.mark.parametrize("name", names(refused=True))
def test_refused(name: str) -> None:
    with pytest.raises(OnnxError, match="support"):
        check(CpuBackend, name)


def test_a_node_alone() -> None:
    node = helper.make_node("Add", ["a", "b"], ["sum"])
    arrays = [np.arange(3, dtype=np.float32), np.float32([10])]
    (found,) = CpuBackend.run_node(node, arrays)
    np.testing.assert_array_equal(found, [10, 11, 12])
    convolution = helper.make_node("Conv", ["a", "b"], ["c"], name="first")
    with pytest.raises(OnnxError, match=r"^node 'first' \('Conv'\): this operator is not supported"):
        CpuBackend.run_node(convolution, arrays)
    assert CpuBackend.supports_device("CPU") and not CpuBackend.supports_device("CUDA")
