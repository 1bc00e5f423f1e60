"""Tensor intrinsics as KHR cooperative matrices: TVM's matrix calls on fragments of scope "wmma.*".

TVM's WMMA intrinsics (`tvm.s_tir.tensor_intrin.cuda`) leave `tvm_fill_fragment`, `tvm_load_matrix_sync`, `tvm_mma_sync`
and `tvm_store_matrix_sync` in a kernel, so schedules that tensorize with them work for Vulkan as well. A fragment
becomes an array of cooperative matrices of the subgroup. The module then declares the Vulkan memory model, which
SPV_KHR_cooperative_matrix requires.
"""

from __future__ import annotations

from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.analysis import FRAGMENTS
from tvm_attn.vulkan.codegen.threads import ThreadCalls
from tvm_attn.vulkan.codegen.values import DType, number, text

_LAYOUTS = {"row_major": 0, "col_major": 1}


class MatrixCalls(ThreadCalls):
    """Visits matrix calls. Every call gives the shape m, n, k; a fragment keeps the first shape it is seen with."""

    def _effect_tirx_tvm_fill_fragment(self, node: Any) -> None:
        pointer, type_id, dtype = self._fragment(node.args[0], node.args[4], node.args[1:4])
        value = self.arith.cast(self.expr(node.args[5]), dtype)
        filled = self.builder.op("CompositeConstruct", type_id, value.id)
        self.builder.emit("Store", None, pointer, filled)

    def _effect_tirx_tvm_load_matrix_sync(self, node: Any) -> None:
        pointer, type_id, dtype = self._fragment(node.args[0], node.args[4], node.args[1:4])
        memory, layout, stride, access = self._tile(node.args[5], node.args[6], node.args[7], dtype)
        loaded = self.builder.emit("CooperativeMatrixLoadKHR", type_id, memory, layout, stride, *access)
        self.builder.emit("Store", None, pointer, loaded)

    def _effect_tirx_tvm_store_matrix_sync(self, node: Any) -> None:
        pointer, type_id, dtype = self._fragment(node.args[0], node.args[4], node.args[1:4])
        memory, layout, stride, access = self._tile(node.args[5], node.args[6], node.args[7], dtype)
        value = self.builder.emit("Load", type_id, pointer)
        self.builder.emit("CooperativeMatrixStoreKHR", None, memory, value, layout, stride, *access)

    def _effect_tirx_tvm_mma_sync(self, node: Any) -> None:
        ids = []
        for position in range(0, 8, 2):
            pointer, type_id, dtype = self._fragment(node.args[position], node.args[position + 1], None)
            ids.append((pointer, type_id, dtype))
        target, type_id, dtype = ids[0]
        a, b, c = (self.builder.emit("Load", ident, pointer) for pointer, ident, _ in ids[1:])
        if dtype.kind != "float":
            raise CompileError(f"cooperative matrices of {dtype} are not supported; accumulate in float32 or float16")
        self.builder.emit("Store", None, target, self.builder.emit("CooperativeMatrixMulAddKHR", type_id, a, b, c))

    def _fragment(self, data: Any, index: Any, shape: Any) -> tuple[int, int, DType]:
        """The pointer to a matrix of a fragment, its type, and its element type."""
        root = self.analysis.root_of(data)
        use = FRAGMENTS.get(root.scope)
        if use is None:
            raise CompileError(f'a matrix call on buffer {root.name} of scope "{root.scope}"; fragments have "wmma.*"')
        if shape is not None:
            rows, columns, depth = map(number, shape)
            if rows is None or columns is None or depth is None:
                raise CompileError(f"the shape of fragment {root.name} is not constant")
            root.shape = (rows, columns, depth)
        if root.shape is None:
            raise CompileError(f"fragment {root.name} is multiplied before it is filled or loaded")
        m, n, k = root.shape
        rows, columns = ((m, k), (k, n), (m, n))[use]
        self.builder.vulkan_memory_model = True
        type_id = self.builder.cooperative_matrix(self.arith.type(root.dtype), rows, columns, use)
        count = (root.count or 0) // (rows * columns)
        array = self.builder.array(type_id, self.builder.uint(count))
        if root not in self._fragments:
            self._fragments[root] = self.builder.variable("Function", array, root.name)
        place = self.low32(index)
        pointer = self.builder.op(
            "AccessChain", self.builder.pointer("Function", type_id), self._fragments[root], place.id
        )
        return pointer, type_id, root.dtype

    def _tile(
        self, pointer: Any, stride: Any, layout: Any, dtype: DType
    ) -> tuple[int, int, int, tuple[int | str, ...]]:
        """Pointer, layout and stride of a tile in memory, and the memory operands of the access."""
        view, index = self.place(pointer)
        root = view.root
        if view.dtype.scalar != dtype or index.base is None:
            raise CompileError(f"a tile of {view.dtype} for a fragment of {dtype}; their types must agree")
        address, unit = self.memory.tile(view, index, dtype)
        step = self.low32(stride)
        distance = self.arith.binary("mul", step, self.arith.constant(step.dtype, unit.numerator))
        literal = self.arith.literal(distance)
        if literal is None:
            distance = self.arith.binary("div", distance, self.arith.constant(step.dtype, unit.denominator))
        else:
            distance = self.arith.constant(step.dtype, int(literal) // unit.denominator)
        name = _LAYOUTS.get(text(layout))
        if name is None:
            raise CompileError(f'the layout "{text(layout)}" of a tile; row_major and col_major are supported')
        access: tuple[int | str, ...] = ("NonPrivatePointer",)
        if root.scope == "global":
            access = ("Aligned|NonPrivatePointer", dtype.bytes)
        return address, self.builder.uint(name), distance.id, access
