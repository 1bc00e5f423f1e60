"""Relax functions that become one CUDA graph: the lowered program, and a run with a stand-in for CUDA's graphs."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.script import tirx as T

from tvm_attn.compiler.cuda_graph import capture_graphs, plan_results

R = 4
RUN, ALLOCATE = "vm.builtin.cuda_graph.run_or_capture", "vm.builtin.cuda_graph.get_cached_alloc"


@T.prim_func(s_tir=True)
def _embed(token_ids: T.handle, table: T.Buffer((5, 3), "float32"), y: T.handle):
    T.func_attr({"tirx.noalias": True})
    g = T.int32()
    TokenIds = T.match_buffer(token_ids, (g, R), "int32")
    Y = T.match_buffer(y, (g, R, 3), "float32")
    for i, r, e in T.grid(g, R, 3):
        with T.sblock("embed"):
            vi, vr, ve = T.axis.remap("SSS", [i, r, e])
            Y[vi, vr, ve] = table[TokenIds[vi, vr], ve]


@T.prim_func(s_tir=True)
def _remember(x: T.handle, cache: T.handle, y: T.handle):
    """Adds x to the first slot of the cache; y is what the slot holds then."""
    T.func_attr({"tirx.noalias": True})
    g = T.int32()
    slots = T.int32()
    X = T.match_buffer(x, (g, R, 3), "float32")
    Cache = T.match_buffer(cache, (slots, 3), "float32")
    Y = T.match_buffer(y, (g, R, 3), "float32")
    for i, r, e in T.grid(g, R, 3):
        with T.sblock("remember"):
            vi, vr, ve = T.axis.remap("SSS", [i, r, e])
            Cache[0, ve] = Cache[0, ve] + X[vi, vr, ve]
            Y[vi, vr, ve] = Cache[0, ve]


@T.prim_func(s_tir=True)
def _next(x: T.handle, token_ids: T.handle):
    T.func_attr({"tirx.noalias": True})
    g = T.int32()
    X = T.match_buffer(x, (g, R, 3), "float32")
    TokenIds = T.match_buffer(token_ids, (g, R), "int32")
    for i, r in T.grid(g, R):
        with T.sblock("next"):
            vi, vr = T.axis.remap("SS", [i, r])
            TokenIds[vi, vr] = T.Cast("int32", X[vi, vr, 0]) % 5


def program(captured: bool = True, upper_bound: bool = True, groups: int | None = None) -> tvm.IRModule:
    """step(token_ids (g, R), caches, params) -> (g, R, 3), which changes token_ids and caches, and `plain`: the same
    without a graph."""
    builder = relax.BlockBuilder()
    kernels = {
        name: builder.add_func(kernel.with_attr("global_symbol", name), name)
        for name, kernel in (("embed", _embed), ("remember", _remember), ("next_", _next))
    }
    for name in ("step", "plain"):
        g, slots = tirx.Var("g", "int64"), tirx.Var("slots", "int64")
        if groups is not None:
            g = groups  # type: ignore[assignment]
        token_ids = relax.Var("token_ids", relax.TensorType([g, R], "int32"))
        cache_type = relax.TensorType([slots, 3], "float32")
        caches = relax.Var("caches", relax.TupleType([cache_type] * 2))
        params = relax.Var("params", relax.TupleType([relax.TensorType([5, 3], "float32")]))
        attributes: dict[str, Any] = {"relax.force_pure": True}
        if upper_bound:
            attributes["tir_var_upper_bound"] = {"g": 8}
        if captured and name == "step":
            attributes["num_input"] = 0
        activations = relax.TensorType([g, R, 3], "float32")
        with builder.function(name, [token_ids, caches, params], attrs=attributes):
            table = builder.emit(params[0])
            x = builder.emit(relax.call_tir(kernels["embed"], [token_ids, table], activations))
            for layer in range(2):
                arguments = relax.Tuple([x, builder.emit(caches[layer])])
                outputs = [cache_type, activations]
                both = builder.emit(relax.op.call_tir_inplace(kernels["remember"], arguments, [1, -1], outputs))
                x = builder.emit(both[1])
            arguments = relax.Tuple([x, token_ids])
            builder.emit(relax.op.call_tir_inplace(kernels["next_"], arguments, 1, token_ids.ty))
            builder.emit_func_output(x)
    return builder.get()


PASSES: list[Any] = [
    relax.transform.ToNonDataflow(),
    relax.transform.RemovePurityChecking(),
    relax.transform.CallTIRRewrite(),
    plan_results,
    relax.transform.StaticPlanBlockMemory(),
    capture_graphs,
]
REST: list[Any] = [
    relax.transform.LowerAllocTensor(),
    relax.transform.KillAfterLastUse(),
    relax.transform.LowerRuntimeBuiltin(),
    relax.transform.ComputePrimValue(),
    relax.transform.VMShapeLower(),
    relax.transform.AttachGlobalSymbol(),
]


def calls(function: relax.Function) -> list[str]:
    """What a function calls, in order."""
    found = []

    def visit(expression: Any) -> None:
        if not isinstance(expression, relax.Call):
            return
        if isinstance(expression.op, relax.GlobalVar):
            found.append(expression.op.name_hint)
        elif isinstance(expression.op, relax.ExternFunc):
            found.append(str(expression.op.global_symbol))
        elif expression.op.name == "relax.call_builtin_with_ctx":
            found.append(str(expression.args[0].global_symbol))
        else:
            found.append(expression.op.name)

    relax.analysis.post_order_visit(function, visit)
    return found


def test_every_kernel_is_in_the_graph() -> None:
    module = tvm.transform.Sequential(PASSES)(program())
    kernels = ["embed", "remember", "remember", "next_"]
    outside = [name for name in calls(module["step"]) if name != "relax.memory.alloc_tensor"]
    assert outside == [ALLOCATE, RUN, "vm.builtin.copy"]
    inside = [name for name in calls(module["step_cuda_graph_capture"]) if name != "relax.memory.alloc_tensor"]
    assert inside == kernels
    assert calls(module["cuda_graph_alloc"]) == ["relax.memory.alloc_storage"] * 2
    assert calls(module["step_again"]) == [RUN, "vm.builtin.copy"]
    # The others are as if there were no graphs: storage and result allocated by each call.
    plain = [name for name in calls(module["plain"]) if name != "relax.memory.alloc_tensor"]
    assert [name for name in plain if "alloc" not in name] == kernels
    assert plain.count("relax.memory.alloc_storage") == 2 and plain.count("relax.builtin.alloc_tensor") == 1


def test_a_program_without_such_functions_stays_as_it_is() -> None:
    planned = tvm.transform.Sequential(PASSES[:-1])(program(captured=False))
    tvm.ir.assert_structural_equal(capture_graphs(planned), planned)
    tvm.ir.assert_structural_equal(plan_results(planned), planned)


def test_an_unknown_size_is_an_error() -> None:
    """Nobody knows how large the storage must be, so it cannot be allocated ahead."""
    with pytest.raises(Exception, match=r"'step' asks to be captured as one CUDA graph and became 0, with .*embed"):
        tvm.transform.Sequential(PASSES)(program(upper_bound=False))


@pytest.fixture
def graphs() -> Iterator[list[str]]:
    """CUDA graphs on the processor: a launch runs the captured function again, on what it was captured with.

    Gives what happened. The real functions, where there are any, are put back.
    """
    happened: list[str] = []
    states: dict[Any, tuple[Any, Any]] = {}
    allocations: dict[int, Any] = {}
    invoke = tvm_ffi.get_global_func("vm.builtin.invoke_closure")

    def run(context: Any, closure: Any, arguments: Any, index: int, sizes: Any = ()) -> Any:
        key = (index, tuple(sizes))
        happened.append("launch" if key in states else "capture")
        if key in states:
            states[key][0]()
        else:
            kept = list(arguments)
            states[key] = (lambda: invoke(context, closure, *kept), invoke(context, closure, *kept))
        return states[key][1]

    def allocate(context: Any, closure: Any, index: int) -> Any:
        if index not in allocations:
            allocations[index] = invoke(context, closure)
        return allocations[index]

    fakes: dict[str, Callable[..., Any]] = {RUN: run, ALLOCATE: allocate}
    real = {name: tvm_ffi.get_global_func(name, allow_missing=True) for name in fakes}
    for name, fake in fakes.items():
        tvm_ffi.register_global_func(name, fake, override=True)
    yield happened
    states.clear()
    allocations.clear()
    for name, function in real.items():
        if function is None:
            tvm_ffi.registry.remove_global_func(name)
        else:
            tvm_ffi.register_global_func(name, function, override=True)


@pytest.mark.parametrize("groups", [None, 1])
def test_a_launch_does_what_a_call_does(groups: int | None, graphs: list[str]) -> None:
    """`step` and `step_again` against the function without a graph: results, tokens and caches, step by step."""
    module = tvm.transform.Sequential([*PASSES, *REST])(program(groups=groups))
    vm = relax.VirtualMachine(tvm.compile(module, "llvm", relax_pipeline=tvm.transform.Sequential([])), tvm.cpu())
    rng = np.random.default_rng(0)
    table = tvm.runtime.tensor(rng.integers(0, 9, (5, 3)).astype(np.float32))
    states: dict[int, dict[str, Any]] = {}
    results: dict[int, list[np.ndarray]] = {}
    # The last ones launch the graph of one group again, after that of eight used the same storage.
    for g in (1, 1, 1) if groups else (1, 1, 8, 8, 8, 1, 1):
        first = g not in states
        if first:
            tokens = rng.integers(0, 5, (g, R)).astype(np.int32)
            caches = rng.integers(0, 9, (2, 6, 3)).astype(np.float32)
            states[g] = {
                name: [tvm.runtime.tensor(tokens), [tvm.runtime.tensor(cache) for cache in caches]]
                for name in ("step", "plain")
            }
        ours, theirs = states[g]["step"], states[g]["plain"]
        result = vm["step"](*ours, [table]) if first else vm["step_again"](tvm_ffi.Shape([6] if groups else [g, 6]))
        np.testing.assert_array_equal(result.numpy(), vm["plain"](*theirs, [table]).numpy())
        np.testing.assert_array_equal(ours[0].numpy(), theirs[0].numpy())
        for our_cache, their_cache in zip(ours[1], theirs[1], strict=True):
            np.testing.assert_array_equal(our_cache.numpy(), their_cache.numpy())
        results.setdefault(g, []).append(np.from_dlpack(result))
        assert graphs.pop() == ("capture" if first else "launch")
    for views in results.values():
        assert len({view.ctypes.data for view in views}) == 1
