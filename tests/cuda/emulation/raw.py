"""Kernels written in CUDA, for tests of the emulation itself."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T


def kernel(body: str, length: int, size: int, threads: int = 32, blocks: int = 1) -> tirx.PrimFunc:
    """A function of x (length,) and y (size,), uint32, whose threads run CUDA statements.

    The statements can use `const unsigned* x`, `unsigned* y` and `int thread`, the thread's number in its block.
    """
    parameters = "const unsigned* x, unsigned* y"
    source = f"\n__device__ void body({parameters}) {{\nconst int thread = threadIdx.x;\n{body}\n}}\n"

    @T.prim_func
    def function(x: T.Buffer((length,), "uint32"), y: T.Buffer((size,), "uint32")):  # type: ignore[valid-type]
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        T.launch_thread("blockIdx.x", blocks)
        T.launch_thread("threadIdx.x", threads)
        T.evaluate(T.cuda.func_call("body", x.ptr_to([0]), y.ptr_to([0]), source_code=source, return_type="void"))

    assert isinstance(function, tirx.PrimFunc)
    return function


def asm(instruction: str, outputs: Sequence[str], inputs: Sequence[str]) -> str:
    """An asm statement. Operands are written as "constraint(expression)"."""

    def operand(text: str, prefix: str = "") -> str:
        constraint, _, expression = text.partition("(")
        return f'"{prefix}{constraint}"({expression}'

    written = ", ".join(operand(text, "=") for text in outputs)
    read = ", ".join(operand(text) for text in inputs)
    return f'asm volatile("{instruction};" : {written} : {read} : "memory");'
