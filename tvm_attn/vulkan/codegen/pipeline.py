"""Lowering for Vulkan: TVM's default pipeline, with reductions across threads by subgroup shuffles.

TVM lowers cross-thread reductions to shuffles for target kinds that it knows to have them, and `vulkan` is not among
these. So `LowerThreadAllreduce` sees the kernels as `metal` kernels, whose shuffles need no mask; before and after it
they are Vulkan's. This needs a target whose `thread_warp_size` is the device's subgroup size, which
`Target.from_device` does not set: a device with another size refuses the kernel when it is loaded. The stock pipeline
reduces through shared memory; for such a target it, too, separates the last steps with subgroup barriers.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx import compilation_pipeline
from tvm_ffi.structural import structural_map, structural_walk

from tvm_attn.vulkan.codegen.values import number

NAME = "tvm_attn.vulkan"
_UNKNOWN = 1 << 16  # threads of a block whose extent is not constant: more than any device has


def lower_thread_allreduce() -> Any:
    """LowerThreadAllreduce that emits shuffles for Vulkan targets with a `thread_warp_size` above 1."""

    @tvm.transform.module_pass(opt_level=0, name="tvm_attn.LowerThreadAllreduceVulkan")
    def transform(mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        mod = mod.clone()
        targets: dict[Any, Any] = {}
        for variable, function in mod.functions.items():
            target = function.attrs.get("target", None) if hasattr(function, "attrs") and function.attrs else None
            if target is not None and target.kind.name == "vulkan" and int(target.attrs.get("thread_warp_size", 1)) > 1:
                targets[variable] = target
                mod[variable] = function.with_attr("target", _shuffling(target, _block_threads(function)))
        mod = s_tir.transform.LowerThreadAllreduce()(mod)
        for variable, target in targets.items():
            mod[variable] = mod[variable].with_attr("target", target)
        return mod

    return transform


def split_shifts() -> Any:
    """Splits right shifts of 64-bit integers by 32 or more into steps of at most 31.

    NarrowDataType turns int64(x) >> n into a shift of 32 bits, where only such steps mean the same.
    """

    @tirx.transform.prim_func_pass(opt_level=0, name="tvm_attn.SplitShifts")
    def transform(function: tirx.PrimFunc, _module: tvm.IRModule, _: Any) -> tirx.PrimFunc:
        return function.with_body(structural_map(function.body, (tirx.RShift, _steps)))

    return transform


def _steps(shift: Any) -> Any:
    value, amount = shift.a, number(shift.b) or 0
    if shift.ty.dtype != "int64" or amount < 32:
        return shift
    for start in range(0, amount, 31):
        value = tirx.RShift(value, tirx.IntImm("int64", min(amount - start, 31)))
    return value


def _block_threads(function: Any) -> int:
    """The threads of a function's largest block, or more: the product of the largest extents."""
    extents: dict[str, int] = {}

    def visit(node: Any) -> None:
        if node.attr_key == "thread_extent":
            tag = str(node.node.thread_tag)
            if tag.startswith("threadIdx"):
                extents[tag] = max(extents.get(tag, 1), number(node.value) or _UNKNOWN)

    structural_walk(function.body, ((tirx.AttrStmt,), visit))
    return math.prod(extents.values())


def _shuffling(target: Any, threads: int) -> Any:
    """A target with maskless shuffles and the limits of `target`.

    One subgroup adds up the partial sums of the whole block. TVM compares with the target's largest block to see
    whether it can, so the target states a smaller one if the function's blocks of `threads` threads are small enough.
    """
    known = {
        name: int(target.attrs[name])
        for name in ("thread_warp_size", "max_num_threads", "max_shared_memory_per_block")
        if name in target.attrs
    }
    square = known["thread_warp_size"] ** 2
    known["max_num_threads"] = square if threads <= square else max(threads, known.get("max_num_threads", threads))
    config: dict[str, Any] = {"kind": "metal", **known}
    if target.host is not None:
        config["host"] = target.host.export()
    return tvm.target.Target(config)


def pipeline() -> tuple[Any, Any, Any]:
    """The pipeline, its host and its device finalization, as `tirx.build` expects them."""

    @tvm.transform.module_pass(opt_level=0, name=NAME)
    def lower(mod: tvm.IRModule, _: Any) -> tvm.IRModule:
        config = tvm.transform.PassContext.current().config
        return tvm.ir.transform.Sequential(_passes(config))(mod)

    finalize_host = compilation_pipeline.finalize_host_passes
    return lower, finalize_host, compilation_pipeline.finalize_device_passes


def _passes(config: Any) -> list[Any]:
    """TVM's default S-TIR passes, in order, without those for other devices, with two of our own."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerCrossThreadReduction(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.ManifestSharedMemoryLocalStage(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerAutoCopy(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.InjectPermutedLayout(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.InjectSoftwarePipeline(),
        s_tir.transform.TransformMmaBufferLayout(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        split_shifts(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(not bool(config.get("tirx.disable_vectorize", False))),
        s_tir.transform.InjectVirtualThread(),
        s_tir.transform.InjectDoubleBuffer(),
    ]
    if not bool(config.get("tirx.disable_storage_rewrite", False)):
        passes.append(tirx.transform.StorageRewrite())
    passes += [
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
    ]
    if not bool(config.get("tirx.disable_cse_tir", False)):
        passes.append(tirx.transform.CommonSubexprElim())
    return [
        *passes,
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        s_tir.transform.ThreadSync("shared"),
        s_tir.transform.ThreadSync("shared.dyn"),
        s_tir.transform.ThreadSync("warp"),
        s_tir.transform.InferFragment(),
        lower_thread_allreduce(),
        s_tir.transform.MergeSharedMemoryAllocations(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ]


def register() -> None:
    """Makes the pipeline known to TVM: `tvm.compile(..., tir_pipeline="tvm_attn.vulkan")`."""
    compilation_pipeline.register_tir_pipeline(NAME, pipeline)
