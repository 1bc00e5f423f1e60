"""The interface of a kernel: its argument block, the grid and how it is folded, thread indices."""

from __future__ import annotations

import math
from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.analysis import MAX_GRID, Analysis, Root
from tvm_attn.vulkan.codegen.arithmetic import Arithmetic
from tvm_attn.vulkan.codegen.memory import Form, Memory
from tvm_attn.vulkan.codegen.values import BOOL, FLOAT32, INT32, UINT32, DType, Value, from_tvm, number

PUSH_CONSTANT_BYTES = 128
FOLD_GRID_CONSTANT = 0
_AXES = ("x", "y", "z")
_ADDRESS = DType("handle", 64)


class Interface:
    """Layout of the argument block, and access to it.

    The block holds the parameters at their natural alignment (8 for addresses and 64-bit scalars, else 4; small scalars
    are widened to 4 bytes), then the addresses of `aliases` again, then three uint32: the extents of the grid. Up to
    128 bytes it is the push constant block; a larger block is in a buffer, whose address is the push constant.

    Attributes:
        params, offsets: type and byte offset of each parameter.
        aliases: positions of the parameters whose addresses are repeated: a buffer that is accessed as several types
            has one member of the block for each.
        block_size: size of the block in bytes, a multiple of 8.
    """

    def __init__(self, function: Any, arithmetic: Arithmetic, analysis: Analysis, memory: Memory) -> None:
        self.arith = arithmetic
        self.builder = arithmetic.builder
        self._analysis = analysis
        self.params: list[str] = []
        self.offsets: list[int] = []
        self.aliases: list[int] = []
        self._dtypes: list[DType] = []
        self.handles = [root for root in analysis.roots if root.parameter is not None]
        by_parameter = {root.parameter: root for root in self.handles}
        pointers: list[tuple[Root, Form, int]] = []  # and the member that holds each
        more: list[tuple[int, Root, Form]] = []
        members: list[tuple[int, int]] = []
        offset = 0
        for index, parameter in enumerate(function.params):
            root = by_parameter.get(index)
            if root is not None:
                name, size, dtype = "handle", 8, _ADDRESS
                first, *others = memory.forms(root)
                type_id = memory.global_type(first)
                pointers.append((root, first, index))
                more += ((index, root, form) for form in others)
            else:
                dtype = from_tvm(parameter.ty.dtype)
                name = str(dtype)
                size = 8 if dtype.bits == 64 else 4
                type_id = arithmetic.type(_in_block(dtype))
            offset = -(-offset // size) * size
            members.append((type_id, offset))
            self.params.append(name)
            self.offsets.append(offset)
            self._dtypes.append(dtype)
            offset += size
        for index, root, form in more:
            offset = -(-offset // 8) * 8
            pointers.append((root, form, len(members)))
            members.append((memory.global_type(form), offset))
            self.aliases.append(index)
            self._dtypes.append(_ADDRESS)
            offset += 8
        for _ in _AXES:
            members.append((self.builder.int_(32), offset))
            offset += 4
        self.block_size = -(-offset // 8) * 8
        self._members = members
        self._block, self._storage = self._declare()
        for root, form, member in pointers:
            memory.set_base(root, form, self._member(member))

    def _declare(self) -> tuple[int, str]:
        b = self.builder
        struct = b.block_struct(self._members)
        if self.block_size <= PUSH_CONSTANT_BYTES:
            return b.variable("PushConstant", struct, "arguments"), "PushConstant"
        address = b.pointer("PhysicalStorageBuffer", struct)
        variable = b.variable("PushConstant", b.block_struct([(address, 0)]), "arguments")
        pointer = b.op("AccessChain", b.pointer("PushConstant", address), variable, b.uint(0))
        return b.op("Load", address, pointer), "PhysicalStorageBuffer"

    def _member(self, index: int) -> int:
        b = self.builder
        type_id, offset = self._members[index]
        pointer = b.op("AccessChain", b.pointer(self._storage, type_id), self._block, b.uint(index))
        if self._storage == "PushConstant":
            return b.op("Load", type_id, pointer)
        return b.op("Load", type_id, pointer, "Aligned", 8 if offset % 8 == 0 and self._size(index) == 8 else 4)

    def _size(self, index: int) -> int:
        following = self._members[index + 1][1] if index + 1 < len(self._members) else self.block_size
        wide = index < len(self._dtypes) and self._dtypes[index].bits == 64
        return 8 if wide else min(4, following - self._members[index][1])

    def scalar(self, index: int) -> Value:
        """The scalar parameter at position `index`."""
        dtype = self._dtypes[index]
        value = Value(_in_block(dtype), [self._member(index)])
        return self.arith.cast(value, dtype)

    def _extent(self, axis: int) -> int:
        return self._member(len(self._dtypes) + axis)

    # Threads ----------------------------------------------------------------------------------------------------

    def workgroup_size(self) -> list[int]:
        """Extents of the workgroup: those of threadIdx, or a single row with as many threads."""
        size = self._threads()
        return [math.prod(size), 1, 1] if self._in_a_row(size) else size

    def _in_a_row(self, size: list[int]) -> bool:
        """Whether the workgroup is laid out as one row, for kernels whose subgroups must be consecutive threads.

        TIR counts the threads of a block along x, then y, then z, and cuts subgroups in that order. Vulkan guarantees
        no order between rows: only rows of whole subgroups, or a single row, can stay as they are.
        """
        subgroup = self._analysis.subgroup
        return subgroup is not None and size[1] * size[2] > 1 and size[0] % subgroup != 0

    def _threads(self) -> list[int]:
        """Extents of threadIdx, which TVM's GPU targets keep constant."""
        size = []
        for axis in _AXES:
            extent = self._analysis.threads.get(f"threadIdx.{axis}")
            count = 1 if extent is None else number(extent)
            if count is None:
                raise CompileError(f"the extent of threadIdx.{axis} is symbolic; Vulkan needs a constant")
            size.append(count)
        return size

    def thread(self, tag: str, dtype: DType) -> Value:
        """The index of the thread or block along the axis that `tag` names."""
        kind, _, axis_name = tag.partition(".")
        if kind not in ("threadIdx", "blockIdx") or axis_name not in _AXES:
            raise CompileError(f"the thread axis {tag} is not supported; bind threadIdx and blockIdx")
        axis = _AXES.index(axis_name)
        extent = self._analysis.threads[tag]
        if number(extent) == 1:
            return Value(dtype, [self.builder.constant(self.arith.type(INT32), 0)], narrow=dtype.bits == 64)
        ident = self._local(axis) if kind == "threadIdx" else self._group(axis)
        if dtype.bits == 64:
            return Value(dtype, [ident], narrow=True)
        return self.arith.cast(Value(UINT32, [ident]), dtype)

    def _component(self, builtin: str, axis: int) -> int:
        b = self.builder
        vector = b.builtin(builtin, b.vector(b.int_(32), 3))
        return b.op("CompositeExtract", b.int_(32), vector, axis)

    def _local(self, axis: int) -> int:
        size = self._threads()
        if not self._in_a_row(size):
            return self._component("LocalInvocationId", axis)
        index = Value(UINT32, [self._component("LocalInvocationId", 0)])
        before = math.prod(size[:axis])
        index = self.arith.binary("div", index, self.arith.constant(UINT32, before))
        if before * size[axis] < math.prod(size):
            index = self.arith.remainder(index, self.arith.constant(UINT32, size[axis]), floor=False)
        return index.id

    def _folded(self) -> Value:
        b = self.builder
        return Value(BOOL, [b.spec_constant(b.bool_(), FOLD_GRID_CONSTANT, 0)])

    def _linear(self) -> Value:
        """The number of this workgroup in a folded grid."""
        x, y = (Value(UINT32, [self._component("WorkgroupId", axis)]) for axis in (0, 1))
        width = Value(UINT32, [self._component("NumWorkgroups", 0)])
        return self.arith.binary("add", x, self.arith.binary("mul", y, width))

    def _group(self, axis: int) -> int:
        direct = Value(UINT32, [self._component("WorkgroupId", axis)])
        index = self._linear()
        extents = [Value(UINT32, [self._extent(n)]) for n in range(3)]
        for extent in extents[:axis]:
            index = self.arith.binary("div", index, extent)
        if axis < 2:
            index = self.arith.remainder(index, extents[axis], floor=False)
        return self.arith.select(self._folded(), index, direct).id

    def leave_outside_grid(self) -> None:
        """Ends the surplus workgroups of a folded grid; all threads of a workgroup take the same branch."""
        arith, b = self.arith, self.builder
        total = Value(UINT32, [self._extent(0)])
        for axis in (1, 2):
            total = arith.binary("mul", total, Value(UINT32, [self._extent(axis)]))
        outside = arith.binary("and", self._folded(), arith.compare("ge", self._linear(), total))

        def leave() -> None:
            b.emit("Return", None)

        b.branch(outside.id, leave)


def _in_block(dtype: DType) -> DType:
    """The type that a scalar parameter has in the argument block."""
    if dtype.bits >= 32:
        return dtype
    if dtype.kind == "bool":
        return UINT32
    return FLOAT32 if dtype.kind in ("float", "bfloat") else DType(dtype.kind, 32)


__all__ = ["MAX_GRID", "PUSH_CONSTANT_BYTES", "Interface"]
