"""The PTX instructions of the tensor-core kernels, as functions that emit one statement each.

They are called while a TIRx function is built (inside `tvm.script.ir_builder.IRBuilder`, or from the body of a parsed
`T.prim_func`), and take expressions. Registers are elements of `T.alloc_local` buffers with constant indices; those
that hold two 16-bit numbers are uint32. Addresses in shared memory are uint32 (see `shared_address`), and kernels
compute them, so that an address costs only one register and a constant offset.

Fragments of `mma.sync.aligned.m16n8k16.row.col` (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
type"), with group = lane / 4 and pair = lane % 4; a register of A or B holds the numbers of two neighbouring k:

| operand | register | row or column | k |
|---|---|---|---|
| A 16x16 | 0, 1, 2, 3 | row group, group + 8, group, group + 8 | 2 pair, + 1; registers 2 and 3: 8 more |
| B 16x8 | 0, 1 | column group | 2 pair, + 1; register 1: 8 more |
| C 16x8 | 0, 1, 2, 3 | row group (0, 1), group + 8 (2, 3) | columns 2 pair, + 1, 2 pair, + 1 |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

SHORT = {"float16": "f16", "bfloat16": "bf16"}
"""PTX's names of the dtypes that tensor cores multiply here."""


def kernel_attributes(dependent: bool = False) -> dict[str, Any]:
    """Attributes of a TIRx function.

    Args:
        dependent: whether its kernels may start before the kernel before them has ended, from sm_90 on (CUDA C++
            Programming Guide, "Programmatic Dependent Launch and Synchronization"). Such a kernel calls
            `wait_for_earlier_kernel` in every block, before its first read of what any earlier kernel wrote and before
            its first write: the kernel before has waited for its own predecessor, so all of them have ended then. It
            reads what earlier kernels wrote with `load_global`: the compiler may move other loads above the wait, if it
            takes the memory for constant because the kernel does not write it.
    """
    attributes: dict[str, Any] = {"tirx.noalias": True, "tirx.is_scheduled": True}
    if dependent:
        attributes["tirx.kernel_launch_params"] = ["tirx.use_programtic_dependent_launch"]
    return attributes


def uint32(value: tirx.Expr | int) -> tirx.Expr:
    """A non-negative number as uint32."""
    return T.uint32(value) if isinstance(value, int) else T.Cast("uint32", value)


def int64(value: tirx.Expr) -> tirx.Expr:
    """A number as int64, for multiplying a row by its length."""
    return T.Cast("int64", value)


def variable(dtype: str, value: tirx.Expr) -> tirx.Expr:
    """A new scalar in a register; `assign` changes it."""
    scalar = T.alloc_local((1,), dtype)
    T.buffer_store(scalar, value, [0])
    return scalar[0]


def assign(register: tirx.Expr, value: tirx.Expr) -> None:
    """Sets an element of a buffer: a register, or a scalar from `variable`."""
    T.buffer_store(register.source, value, list(register.indices))


@contextmanager
def when(condition: tirx.Expr | None) -> Iterator[None]:
    """Statements emitted inside run only if the condition holds; always if it is None."""
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield


def shared_address(buffer: tirx.Buffer) -> tirx.Expr:
    """The address of a one-dimensional buffer in the shared memory window, uint32."""
    return T.cuda.cvta_generic_to_shared(buffer.ptr_to([0]))


def swizzle(row: tirx.Expr, unit: tirx.Expr, row_bytes: int, unit_bytes: int = 16) -> tirx.Expr:
    """The position of a unit in its row of shared memory, chosen so that a column of units touches all banks.

    Reading one unit of each of 128 / `unit_bytes` consecutive rows (which is what `ldmatrix` does with 16 bytes) takes
    one pass if the units are in different banks, that is, at different offsets modulo 128 bytes. Rows of 128 bytes and
    more all begin in bank 0, so unit u of row r goes to position u ^ (r % 8). Rows of 64 bytes begin in banks 0 and 16
    alternately, so every two rows share a value: u ^ (r / 2 % 4). Adding a multiple of 8 rows changes no position.
    """
    units, line_units = row_bytes // unit_bytes, 128 // unit_bytes
    rows_per_line = max(1, line_units // units)
    distinct = min(units, line_units)
    return unit if distinct == 1 else unit ^ (row // rows_per_line % distinct)


def cp_async(
    shared: tirx.Expr,
    source: tirx.Expr,
    size: int = 16,
    valid: tirx.Expr | None = None,
    read: tirx.Expr | None = None,
) -> None:
    """Starts a copy of 4, 8 or 16 bytes from global to shared memory; copies zeros if `valid` is false.

    Args:
        shared: address in shared memory, uint32, a multiple of `size`.
        source: pointer to global memory, a multiple of `size`; not read if `valid` is false, and may then point
            anywhere.
        size: number of bytes. Copies of 16 bypass the L1 cache, and bring the 128 bytes around them into L2: others of
            the block, or its next copies, want these.
        valid: condition, or None for always.
        read: in place of `valid`, the number of bytes that are read, uint32; zeros follow.
    """
    kind = "cg.shared.global.L2::128B" if size == 16 else "ca.shared.global"
    if valid is not None:
        read = T.Select(valid, T.uint32(size), T.uint32(0))
    T.evaluate(T.ptx[f"cp.async.{kind}"](shared, source, size, *([] if read is None else [read])))


def cp_async_commit() -> None:
    """Ends a group: the copies that this thread started since the last group."""
    T.evaluate(T.ptx.cp.async_.commit_group())


def cp_async_wait(pending: int) -> None:
    """Waits until at most the `pending` newest groups of this thread are incomplete."""
    T.evaluate(T.ptx.cp.async_.wait_group(pending))


def ldmatrix(registers: Sequence[tirx.Expr], row: tirx.Expr, transpose: bool = False) -> None:
    """Loads one, two or four 8x8 matrices of 16-bit numbers, one register each.

    Lanes 8 i to 8 i + 7 give the addresses of the 16-byte rows of matrix i. A lane receives the numbers 2 pair and
    2 pair + 1 of row `group`; with `transpose`, of column `group`.
    """
    trans = ".trans" if transpose else ""
    instruction = T.ptx[f"ldmatrix.sync.aligned.m8n8.x{len(registers)}{trans}.shared.b16"]
    T.evaluate(instruction(*registers, row))


def mma(c: Sequence[tirx.Expr], a: Sequence[tirx.Expr], b: Sequence[tirx.Expr], dtype: str) -> None:
    """c += a b: (16, 8) float32, four registers; (16, 16) and (16, 8) of `dtype`, four and two registers."""
    short = SHORT[dtype]
    instruction = T.ptx[f"mma.sync.aligned.m16n8k16.row.col.f32.{short}.{short}.f32"]
    T.evaluate(instruction(*c, *a, *b, *c))


def pack(register: tirx.Expr, low: tirx.Expr, high: tirx.Expr, dtype: str) -> None:
    """Rounds two float32 to `dtype`, to nearest even; `low` is at the lower address when the register is stored."""
    T.evaluate(T.ptx[f"cvt.rn.{SHORT[dtype]}x2.f32"](register, high, low))


def permute_bytes(register: tirx.Expr, a: tirx.Expr, b: tirx.Expr, selector: tirx.Expr | int) -> None:
    """Byte i of the result is the byte that nibble i of `selector` names: 0-3 for a, 4-7 for b; all are uint32."""
    chosen = T.uint32(selector) if isinstance(selector, int) else selector
    T.evaluate(T.ptx["prmt.b32"](register, a, b, chosen))


def mask_or(register: tirx.Expr, a: tirx.Expr, mask: int, bits: int) -> None:
    """(a & mask) | bits in one instruction; ptxas makes two of the expression, each with one constant."""
    T.evaluate(T.ptx["lop3.b32"](register, a, T.uint32(mask), T.uint32(bits), 0xF0 & 0xCC | 0xAA))


def mask_xor(register: tirx.Expr, a: tirx.Expr, mask: int, bits: int) -> None:
    """(a & mask) ^ bits in one instruction."""
    T.evaluate(T.ptx["lop3.b32"](register, a, T.uint32(mask), T.uint32(bits), 0xF0 & 0xCC ^ 0xAA))


def fma_pairs(register: tirx.Expr, a: tirx.Expr, b: tirx.Expr, c: tirx.Expr, dtype: str) -> None:
    """a * b + c for both numbers of a register, rounded once."""
    T.evaluate(T.ptx[f"fma.rn.{SHORT[dtype]}x2"](register, a, b, c))


def load_shared(registers: Sequence[tirx.Expr], address: tirx.Expr) -> None:
    """Loads one, two or four 32-bit registers; the address is a multiple of their total size."""
    T.evaluate(T.ptx[f"ld.shared{_vector(registers)}.b32"](*registers, address))


def store_shared(address: tirx.Expr, registers: Sequence[tirx.Expr]) -> None:
    """Stores one, two or four 32-bit registers; the address is a multiple of their total size."""
    T.evaluate(T.ptx[f"st.shared{_vector(registers)}.b32"](address, *registers))


def load_global(registers: Sequence[tirx.Expr], pointer: tirx.Expr) -> None:
    """Loads one, two or four 32-bit registers; the pointer is a multiple of their total size."""
    T.evaluate(T.ptx[f"ld.global{_vector(registers)}.b32"](*registers, pointer))


def store_global(pointer: tirx.Expr, registers: Sequence[tirx.Expr]) -> None:
    """Stores one, two or four 32-bit registers; the pointer is a multiple of their total size."""
    T.evaluate(T.ptx[f"st.global{_vector(registers)}.b32"](pointer, *registers))


def wait_for_earlier_kernel(dependent: bool) -> None:
    """Waits until the kernel before has ended and its writes are visible, if this one may have started early."""
    if dependent:
        T.evaluate(T.ptx.griddepcontrol.wait())


def start_next_kernel(dependent: bool) -> None:
    """Lets the next kernel start as soon as every block of this one has called this and there is room, if it may."""
    if dependent:
        T.evaluate(T.ptx.griddepcontrol.launch_dependents())


def exp2(register: tirx.Expr, x: tirx.Expr) -> None:
    """2**x for float32 with a relative error of 2**-22; results below 2**-126 are 0."""
    T.evaluate(T.ptx["ex2.approx.ftz.f32"](register, x))


def reciprocal(register: tirx.Expr, x: tirx.Expr) -> None:
    """1 / x for float32 with an error of one unit in the last place; 1 / infinity is 0."""
    T.evaluate(T.ptx["rcp.approx.ftz.f32"](register, x))


def arrive(before: tirx.Expr, counter: tirx.Expr, blocks: tirx.Expr) -> None:
    """Counts a block of threads; `before` becomes the number of those that came earlier. Called by one thread.

    The last of `blocks` sees what the others wrote before, and sets the counter back to the zero of the start.

    Args:
        before: a register, uint32.
        counter: pointer to uint32 in global memory.
        blocks: the number of blocks that will come.
    """
    T.evaluate(T.ptx["atom.acq_rel.gpu.global.inc.u32"](before, counter, uint32(blocks - 1)))


def _vector(registers: Sequence[tirx.Expr]) -> str:
    return "" if len(registers) == 1 else f".v{len(registers)}"


def mbarrier_init(barrier: tirx.Expr, count: int) -> None:
    """Sets up a barrier in shared memory whose phase ends with `count` arrivals."""
    T.evaluate(T.ptx.mbarrier.init.shared.b64(barrier, T.uint32(count)))


def mbarrier_arrive(barrier: tirx.Expr) -> None:
    """Arrives once; what this thread wrote before is visible to those who wait."""
    T.evaluate(T.ptx.mbarrier.arrive.shared.b64(barrier, T.uint32(1)))


def mbarrier_wait(barrier: tirx.Expr, parity: tirx.Expr) -> None:
    """Waits until the phase of this parity is over: the first phase has parity 0."""
    T.evaluate(T.cuda.mbarrier_wait(barrier, parity))


def fence_async_proxy() -> None:
    """Orders this thread's writes to shared memory before reads by `wgmma` and the copy engine."""
    T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())


def wgmma_descriptor(address: tirx.Expr, leading: int, stride: int) -> tirx.Expr:
    """The descriptor of a matrix in shared memory with the 128-byte swizzle (PTX ISA, "Matrix Descriptor Format").

    Args:
        address: its first byte, uint32; the swizzle's pattern starts at multiples of 1024.
        leading: bytes between columns of 64 numbers, if rows are longer than that.
        stride: bytes between groups of eight rows.
    """
    constant = leading // 16 << 16 | stride // 16 << 32 | 1 << 62
    return T.Cast("uint64", (address & T.uint32(0x3FFFF)) >> T.uint32(4)) | T.uint64(constant)


def wgmma(
    c: Sequence[tirx.Expr],
    a: Sequence[tirx.Expr] | tirx.Expr,
    b: tirx.Expr,
    dtype: str,
    accumulate: bool = True,
    transposed: bool = False,
) -> None:
    """Starts c (64, N) = a (64, 16) b (16, N), or c += a b, of a warpgroup.

    Args:
        c: N / 2 float32 registers; those of a warp are its 16 rows, as in `mma`, 8 columns after the other.
        a: four registers of `dtype`, as in `mma`; or a descriptor of a matrix whose rows have their 16 numbers side by
            side.
        b: descriptor of the matrix.
        dtype: dtype of a and b.
        accumulate: whether to add to c.
        transposed: False if the 16 numbers of a column of b lie side by side, True if those of a row do.
    """
    short = SHORT[dtype]
    instruction = T.ptx[f"wgmma.mma_async.sync.aligned.m64n{len(c) * 2}k16.f32.{short}.{short}"]
    if isinstance(a, Sequence):
        T.evaluate(instruction(*c, *a, b, T.bool(accumulate), 1, 1, int(transposed)))
    else:
        T.evaluate(instruction(*c, a, b, T.bool(accumulate), 1, 1, 0, int(transposed)))


def wgmma_fence() -> None:
    """Orders earlier accesses to registers before those of the next `wgmma`."""
    T.evaluate(T.ptx["wgmma.fence.sync.aligned"]())


def wgmma_commit() -> None:
    """Ends a group: the products that this warpgroup started since the last group."""
    T.evaluate(T.ptx["wgmma.commit_group.sync.aligned"]())


def wgmma_wait(pending: int) -> None:
    """Waits until at most the `pending` newest groups of this warpgroup are incomplete."""
    T.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](pending))
