"""Compiles a program to a shared library: schedules the kernels, lowers Relax, generates code, links."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx

from tvm_attn.compiler.cuda_graph import capture_graphs, plan_results
from tvm_attn.compiler.devices import backend_for
from tvm_attn.compiler.dump import Dump
from tvm_attn.compiler.fusion import fuse_primitive_functions
from tvm_attn.compiler.linker import find_cxx
from tvm_attn.compiler.workspaces import plan_workspaces
from tvm_attn.errors import CompileError
from tvm_attn.model.module import Program
from tvm_attn.schedule import RecordBook
from tvm_attn.schedule.plan import Planned, plan
from tvm_attn.targets import Target


def _schedule_kernels(program: Program, target: Target, book: RecordBook) -> tuple[tvm.IRModule, dict[str, Planned]]:
    """The module with every kernel scheduled, and the schedule of each function that is a kernel."""
    planned = {}
    functions = dict(program.module.functions_items())
    for variable in functions:
        name = variable.name_hint
        if name in program.kernels:
            planned[name] = plan(program.kernels[name], target, book)
            functions[variable] = planned[name].function.with_attr("global_symbol", name)
    return tvm.IRModule(functions), planned


@tvm.transform.module_pass(opt_level=0, name="LazyTransformParams")
def _lazy_transform_params(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Makes `transform_params` ask for one canonical parameter at a time, so that memory never holds two copies of all.

    The stock pass would rewrite every function of the module.
    """
    variable = module.get_global_var("transform_params")
    lazy = relax.transform.LazyGetInput()(tvm.IRModule({variable: module[variable]}))
    functions = dict(module.functions_items())
    functions[variable] = lazy["transform_params"]
    return tvm.IRModule(functions)


@tvm.transform.module_pass(opt_level=0, name="DeclareNoAlias")
def _declare_no_alias(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Adds `tirx.noalias` to Relax's shape functions, which have one parameter and lack it.

    If one function of a module lacks it, LLVM code generation drops noalias from every function, and accumulators then
    leave their registers at each step: the matrix multiplications ran 2.7 times slower.
    """
    functions = {
        variable: function.with_attr("tirx.noalias", True) if isinstance(function, tirx.PrimFunc) else function
        for variable, function in module.functions_items()
    }
    return tvm.IRModule(functions)


def _lower(dump: Dump) -> tvm.transform.Pass:
    """The Relax passes that this program needs: it only calls kernels, so nothing is legalised or fused."""
    return tvm.transform.Sequential(
        [
            dump.after("fused", fuse_primitive_functions),
            dump.after(
                "calls",
                _lazy_transform_params,
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
            ),
            dump.after("planned", plan_workspaces, plan_results, relax.transform.StaticPlanBlockMemory()),
            dump.after("captured", capture_graphs),
            dump.after(
                "lowered",
                relax.transform.LowerAllocTensor(),
                relax.transform.KillAfterLastUse(),
                relax.transform.LowerRuntimeBuiltin(),
                relax.transform.ComputePrimValue(),
                relax.transform.VMShapeLower(),
                relax.transform.AttachGlobalSymbol(),
                _declare_no_alias,
            ),
        ]
    )


def compile_program(
    program: Program,
    target: Target,
    library: Path,
    progress: Callable[[str], None] = lambda message: None,
    book: RecordBook | None = None,
) -> dict[str, Planned]:
    """Compiles a program for a target and writes the shared library.

    Args:
        program: the Relax module and its kernels.
        target: the hardware.
        library: path of the library; it is written completely or not at all.
        progress: called with a message before a step that takes long.
        book: the tuned records; by default those that `RecordBook.load` finds.

    Returns:
        The schedule of each kernel, by the name of its function.

    Raises:
        ScheduleError: a kernel has no template, or a record does not fit.
        CompileError: TVM, the C++ compiler or the CUDA compiler failed, or a compiler is missing.
    """
    find_cxx(target.architecture)
    backend = backend_for(target)
    backend.check(target)  # refuses to start what it cannot finish
    dump = Dump(library.stem)
    dump.module("program", program.module)
    module, planned = _schedule_kernels(program, target, book or RecordBook.load(target))
    dump.module("scheduled", module)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder) / library.name
        try:
            backend.link(lambda: _build(module, target, dump), target, temporary, progress)
        except CompileError:
            raise
        except Exception as error:  # TVM raises whatever its C++ code maps to
            last_line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise CompileError(f"compiling for {target.name} failed: {last_line}") from error
        finally:
            # TVM puts SIGINT's handler back so that it restarts what it interrupts: Ctrl-C would end no wait any more.
            signal.siginterrupt(signal.SIGINT, True)
        temporary.replace(library)
    return planned


def _build(module: tvm.IRModule, target: Target, dump: Dump) -> Any:
    backend = backend_for(target)
    passes, lower_kernels = _lower(dump), backend.tir_pipeline(target)
    executable = relax.build(module, backend.tvm_target(target), relax_pipeline=passes, tir_pipeline=lower_kernels)
    dump.code(executable.mod)
    return executable
