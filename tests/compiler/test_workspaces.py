"""Scratch memory of kernels as planned tensors."""

from typing import Any

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import tirx as T

from tvm_attn import targets
from tvm_attn.compiler.cuda_graph import capture_graphs, plan_results
from tvm_attn.compiler.cuda_module import cuda_source
from tvm_attn.compiler.devices import backend_for
from tvm_attn.compiler.workspaces import allocates, plan_workspaces
from tvm_attn.kernels.base import ZEROED


@T.prim_func
def _reverse(a: T.handle, b: T.handle):
    T.func_attr({"global_symbol": "reverse", "tirx.noalias": True, "tirx.is_scheduled": True})
    A = T.match_buffer(a, (64,), "float32")
    B = T.match_buffer(b, (64,), "float32")
    workspace = T.alloc_buffer((64,), "float32", scope="global")
    with T.attr(0, "tirx.device_entry", True):
        thread = T.thread_id([64])
        workspace[thread] = A[thread]
        T.cuda.cta_sync()
        B[thread] = workspace[63 - thread]


@T.prim_func
def _counting(a: T.handle, b: T.handle):
    T.func_attr({"global_symbol": "counting", "tirx.noalias": True, "tirx.is_scheduled": True, ZEROED: "zeros"})
    A = T.match_buffer(a, (64,), "float32")
    B = T.match_buffer(b, (64,), "float32")
    workspace = T.alloc_buffer((64,), "float32", scope="global")
    zeros = T.alloc_buffer((2,), "uint32", scope="global")
    with T.attr(0, "tirx.device_entry", True):
        thread = T.thread_id([2])
        zeros[thread] = T.uint32(0)
    with T.attr(0, "tirx.device_entry", True):
        thread = T.thread_id([64])
        workspace[thread] = A[thread]
        B[thread] = workspace[thread] + T.Cast("float32", zeros[thread % 2])


@T.prim_func
def _dynamic(a: T.handle, b: T.handle):
    T.func_attr({"global_symbol": "dynamic", "tirx.noalias": True, "tirx.is_scheduled": True})
    n = T.int32()
    A = T.match_buffer(a, (n,), "float32")
    B = T.match_buffer(b, (n,), "float32")
    workspace = T.alloc_buffer((n,), "float32", scope="global")
    with T.attr(0, "tirx.device_entry", True):
        block = T.cta_id([n])
        workspace[block] = A[block]
        B[block] = workspace[block]


@T.prim_func(s_tir=True)
def _s_tir(a: T.handle, b: T.handle):
    T.func_attr({"global_symbol": "s_tir", "tirx.noalias": True})
    A = T.match_buffer(a, (64,), "float32")
    B = T.match_buffer(b, (64,), "float32")
    with T.sblock("root"):
        workspace = T.sblock_alloc_buffer((64,), "float32")
        for i in range(64):
            with T.sblock("first"):
                v = T.axis.spatial(64, i)
                workspace[v] = A[v]
        for i in range(64):
            with T.sblock("second"):
                v = T.axis.spatial(64, i)
                B[v] = workspace[63 - v]


def program(kernel: tirx.PrimFunc, **attributes: Any) -> tvm.IRModule:
    """main(x): three times the kernel, without dataflow and with explicit allocations."""
    builder = relax.BlockBuilder()
    variable = builder.add_func(kernel, str(kernel.attrs["global_symbol"]))
    x = relax.Var("x", relax.TensorType([64], "float32"))
    with builder.function("main", [x], attrs={"relax.force_pure": True, **attributes}):
        y: relax.Expr = x
        for _ in range(3):
            y = builder.emit(relax.call_tir(variable, [y], x.ty))
        builder.emit_func_output(y)
    return relax.transform.CallTIRRewrite()(relax.transform.RemovePurityChecking()(builder.get()))


def calls(module: tvm.IRModule, name: str) -> list[relax.Call]:
    found = []

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.Call) and isinstance(expression.op, relax.GlobalVar):
            found.append(expression)

    relax.analysis.post_order_visit(module[name], visit)
    return found


def test_workspace_becomes_a_planned_tensor() -> None:
    before = program(_reverse)
    after = plan_workspaces(before)
    assert allocates(before["reverse"]) and not allocates(after["reverse"])
    assert len(after["reverse"].params) == len(before["reverse"].params) + 1
    # The kernel is the same: the host hands over another pointer.
    target = backend_for(targets.read("cuda")).tvm_target(targets.read("cuda"))
    assert cuda_source(after["reverse"], target) == cuda_source(before["reverse"], target)
    assert [len(call.args) for call in calls(after, "main")] == [3, 3, 3]
    assert all(call.args[2].ty == relax.TensorType([64], "float32") for call in calls(after, "main"))
    # Two intermediates and a workspace at a time; the result is not planned.
    planned = relax.transform.StaticPlanBlockMemory()(after)
    assert planned["main"].script().count("R.memory.alloc_storage") == 3


def test_what_stays_zero_is_a_constant_of_the_machine() -> None:
    """A virtual machine has copies of its own of constants, so that models share no counters."""
    after = plan_workspaces(program(_counting, num_input=0))
    assert not allocates(after["counting"]) and len(after["counting"].params) == 4
    assert ZEROED not in after["counting"].attrs
    target = backend_for(targets.read("cuda")).tvm_target(targets.read("cuda"))
    assert cuda_source(program(_counting)["counting"], target).count("__global__") == 2 * 2  # declared and defined
    assert cuda_source(after["counting"], target).count("__global__") == 2
    passed = [call.args[3] for call in calls(after, "main")]
    assert len(passed) == 3 and all(zeros.same_as(passed[0]) for zeros in passed)
    assert str(passed[0].value.dtype) == "uint32" and passed[0].value.numpy().tolist() == [0, 0]
    passes = [plan_results, relax.transform.StaticPlanBlockMemory(), capture_graphs]
    captured = tvm.transform.Sequential(passes)(after)
    assert len(calls(captured, "main_cuda_graph_capture")) == 3


def test_other_kernels_stay() -> None:
    for kernel in (_s_tir, _reverse.without_attr("tirx.is_scheduled")):
        module = program(kernel)
        assert plan_workspaces(module).same_as(module)


def test_sizes_are_static() -> None:
    with pytest.raises(Exception, match="the workspace 'workspace' of kernel 'dynamic' has no static size"):
        plan_workspaces(program(_dynamic))


@pytest.mark.parametrize("kernel", [_reverse, _s_tir], ids=["tirx", "s_tir"])
def test_graphs_hold_all_their_memory(kernel: tirx.PrimFunc) -> None:
    passes = [plan_results, relax.transform.StaticPlanBlockMemory(), capture_graphs]
    with pytest.raises(Exception, match="of 'main' takes scratch memory that may move"):
        tvm.transform.Sequential(passes)(program(kernel, num_input=0))
    if kernel is _reverse:
        module = tvm.transform.Sequential([plan_workspaces, *passes])(program(kernel, num_input=0))
        assert len(calls(module, "main_cuda_graph_capture")) == 3
