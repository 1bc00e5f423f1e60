"""From a program to a shared library: schedule the kernels, lower Relax, generate code, link."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import tvm
from tvm import relax, tirx

from tvm_attn.compiler.fusion import fuse_primitive_functions
from tvm_attn.errors import CompileError
from tvm_attn.model.module import Program
from tvm_attn.schedule import Record, RecordBook, schedule, template_for
from tvm_attn.targets import GpuTarget, Target


def _schedule_kernels(program: Program, target: Target) -> tuple[tvm.IRModule, list[Record]]:
    """The module with every kernel scheduled, and the tuned records that were used."""
    book, used = RecordBook.load(target.name), []
    functions = dict(program.module.functions_items())
    for variable in functions:
        kernel = program.kernels.get(variable.name_hint)
        if kernel is None:
            continue
        record = book.find(template_for(kernel, target), kernel)
        if record:
            used.append(record)
        function = schedule(kernel, target, record.decisions if record else None)
        functions[variable] = function.with_attr("global_symbol", variable.name_hint)
    return tvm.IRModule(functions), used


@tvm.transform.module_pass(opt_level=0, name="LazyTransformParams")
def _lazy_transform_params(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Makes `transform_params` ask for one canonical parameter at a time, so that two copies of all are never needed.

    The stock pass would rewrite every function of the module.
    """
    variable = module.get_global_var("transform_params")
    lazy = relax.transform.LazyGetInput()(tvm.IRModule({variable: module[variable]}))
    functions = dict(module.functions_items())
    functions[variable] = lazy["transform_params"]
    return tvm.IRModule(functions)


@tvm.transform.module_pass(opt_level=0, name="DeclareNoAlias")
def _declare_no_alias(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Gives the attribute to Relax's shape functions, which have one parameter and lack it.

    LLVM code generation drops noalias from every function of a module where one function lacks it, and accumulators
    then leave their registers at each step: the matrix multiplications ran 2.7 times slower.
    """
    functions = {
        variable: function.with_attr("tirx.noalias", True) if isinstance(function, tirx.PrimFunc) else function
        for variable, function in module.functions_items()
    }
    return tvm.IRModule(functions)


def _lower() -> tvm.transform.Pass:
    """Relax's passes that this program needs: it has calls of kernels only, so nothing is legalised or fused."""
    return tvm.transform.Sequential(
        [
            fuse_primitive_functions,
            _lazy_transform_params,
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
            _declare_no_alias,
        ]
    )


def tvm_target(target: Target) -> tvm.target.Target:
    """The TVM target, with the processor that starts the kernels of a GPU."""
    if target.device == "cpu":
        return tvm.target.Target(target.tvm)
    return tvm.target.Target(target.tvm, {"kind": "llvm", "mtriple": f"{target.architecture}-linux-gnu"})


def tir_pipeline(target: Target) -> str:
    """The name of the passes that lower kernels: TVM's own, or those that use the subgroups of a Vulkan device."""
    if target.device != "vulkan" or not isinstance(target, GpuTarget) or target.subgroup is None:
        return "default"
    from tvm_attn.vulkan.codegen import pipeline

    pipeline.register()
    return pipeline.NAME


def compile_program(program: Program, target: Target, library: Path) -> list[Record]:
    """Compiles a program for a target and writes the shared library.

    Args:
        program: the Relax module and its kernels.
        target: the hardware.
        library: path of the library; it appears whole or not at all.

    Returns:
        The tuned records that were used.

    Raises:
        ScheduleError: a kernel has no template, or a record does not fit.
        CompileError: TVM or the C++ compiler failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        raise CompileError(
            f"no C++ compiler ({compiler or 'g++, clang++'}) to link the library: install g++ or set CXX"
        )
    module, records = _schedule_kernels(program, target)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder) / library.name
        try:
            executable = relax.build(
                module, tvm_target(target), relax_pipeline=_lower(), tir_pipeline=tir_pipeline(target)
            )
            executable.export_library(str(temporary))
        except Exception as error:  # TVM raises whatever its C++ code maps to
            last_line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise CompileError(f"compiling for {target.name} failed: {last_line}") from error
        temporary.replace(library)
    return records
