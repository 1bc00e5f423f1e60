"""Relax functions that run as one CUDA graph: the first call captures their kernels, later calls launch the graph.

A function asks for this with the attribute `num_input` = 0, which tells Relax's `RewriteCUDAGraph` that no argument
may move: each has the same address in every call of one virtual machine. Sizes that are known only at run time may
differ between calls; each combination of them is captured once.

Two things keep such a function from becoming a single graph. First, Relax allocates a function's result anew in each
call, outside the memory plan and so outside the graph. Here the result goes through `vm.builtin.copy`, which returns
its argument, so it is planned like any intermediate: it has the same address each time, and the next call overwrites
it. Second, `RewriteCUDAGraph` rewrites every function of a module. Here it sees only those that asked.

A call of such a function checks every argument (hundreds, with a model's parameters), though a launch needs none. So
each function `f` gets a second one, `f_again(sizes)`, which launches the graph that a call of `f` has captured for
these sizes: the symbolic sizes of `f`'s parameters, in the order in which they first appear.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from tvm_attn.compiler.workspaces import allocates
from tvm_attn.errors import CompileError

_RUN_OR_CAPTURE = "vm.builtin.cuda_graph.run_or_capture"
_COPY = "vm.builtin.copy"


@tvm.transform.module_pass(opt_level=0, name="PlanResults")
def plan_results(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Puts results of captured functions into the memory plan. Runs after CallTIRRewrite, before memory is planned."""
    functions = dict(module.functions_items())
    for variable, function in _captured(module).items():
        *blocks, last = function.body.blocks
        result = relax.Var("result", function.body.body.ty)
        last = relax.BindingBlock([*last.bindings, relax.VarBinding(result, _copy(function.body.body))])
        functions[variable] = relax.Function(
            function.params, relax.SeqExpr([*blocks, last], result), function.ret_ty, function.is_pure, function.attrs
        )
    return tvm.IRModule(functions)


@tvm.transform.module_pass(opt_level=0, name="CaptureGraphs")
def capture_graphs(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Applies RewriteCUDAGraph to the functions that ask for it. Runs after StaticPlanBlockMemory.

    Raises:
        CompileError: a kernel of such a function would be started outside of its graph, or its memory may move.
    """
    wanted = _captured(module)
    if not wanted:
        return module
    kernels = {
        variable: function for variable, function in module.functions_items() if isinstance(function, tirx.PrimFunc)
    }
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        rewritten = relax.transform.RewriteCUDAGraph()(tvm.IRModule({**wanted, **kernels}))
    functions = {**dict(module.functions_items()), **dict(rewritten.functions_items())}
    for variable in wanted:
        name = variable.name_hint
        functions[relax.GlobalVar(f"{name}_again")] = _again(name, rewritten[name])
        _check_memory(rewritten, name)
    return tvm.IRModule(functions)


def _captured(module: tvm.IRModule) -> dict[relax.GlobalVar, relax.Function]:
    """The functions that ask to be captured."""
    return {
        variable: function
        for variable, function in module.functions_items()
        if isinstance(function, relax.Function) and function.attrs and function.attrs.get("num_input", None) == 0
    }


def _copy(value: relax.Expr) -> relax.Call:
    return relax.Call(relax.ExternFunc(_COPY), [value], ty_args=[value.ty])


def _again(name: str, function: relax.Function) -> relax.Function:
    """The function that launches what a call of `function` has captured."""
    function = relax.utils.copy_with_new_vars(function)
    launch = _only_launch(name, function)
    extern, (capture, _, index, *key) = launch.args[0], launch.args[1].fields
    variables: list[Any] = []
    for parameter in function.params:
        for variable in relax.analysis.definable_tir_vars_in_type(parameter.ty):
            if not any(variable.same_as(known) for known in variables):
                variables.append(variable)
    sizes = relax.Var("sizes", relax.ShapeType(variables))
    builder = relax.BlockBuilder()
    with builder.function(f"{name}_again", [sizes], attrs={"relax.force_pure": True}):
        arguments = relax.Tuple([capture, relax.Tuple([]), index, *key])
        results = builder.emit(relax.Call(launch.op, [extern, arguments], ty_args=list(launch.ty_args)))
        result = builder.emit(relax.TupleGetItem(results, 0))
        builder.emit_func_output(builder.emit(_copy(result)))
    return builder.get()[f"{name}_again"].with_attr("global_symbol", f"{name}_again")


def _check_memory(module: tvm.IRModule, name: str) -> None:
    """Raises CompileError if a captured kernel takes memory that the graph does not hold."""

    def visit(expression: Any) -> None:
        if not isinstance(expression, relax.Call) or not isinstance(expression.op, relax.GlobalVar):
            return
        if allocates(module[expression.op]):
            raise CompileError(f"kernel {expression.op.name_hint!r} of {name!r} takes scratch memory that may move")

    relax.analysis.post_order_visit(module[f"{name}_cuda_graph_capture"], visit)


def _only_launch(name: str, function: relax.Function) -> relax.Call:
    """The call that runs or captures the function's graph. Raises CompileError unless it does all of the work."""
    launches: list[relax.Call] = []
    outside: list[str] = []

    def visit(expression: Any) -> None:
        if not isinstance(expression, relax.Call):
            return
        if isinstance(expression.op, relax.GlobalVar):
            outside.append(expression.op.name_hint)
        elif _is_extern(expression.op) and not _is_extern(expression.op, _COPY):
            outside.append(expression.op.global_symbol)
        elif expression.args and _is_extern(expression.args[0], _RUN_OR_CAPTURE):
            launches.append(expression)

    relax.analysis.post_order_visit(function, visit)
    # A single result is the function's result: nothing else is used after the launch.
    if len(launches) != 1 or len(launches[0].ty.fields) != 1 or outside:
        raise CompileError(
            f"function {name!r} asks to be captured as one CUDA graph and became {len(launches)}, with "
            f"{', '.join(outside) or 'nothing'} outside: an argument or a size is not static"
        )
    return launches[0]


def _is_extern(expression: Any, name: str | None = None) -> bool:
    return isinstance(expression, relax.ExternFunc) and name in (None, expression.global_symbol)
