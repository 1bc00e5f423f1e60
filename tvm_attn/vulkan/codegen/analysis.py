"""One walk over a kernel before code is emitted: its threads, its memories, how each is used.

A memory (`Root`) is a buffer parameter or an allocation; buffers are views of it. The walk decides how memory is
declared: the element types of shared and local arrays, which parts of a dynamic allocation overlap, and which loads
read memory that nothing writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import Any

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.facts import Fact, Facts
from tvm_attn.vulkan.codegen.loops import Loop, copies
from tvm_attn.vulkan.codegen.values import DType, from_tvm, number, text

# A loop that indexes local arrays is marked for unrolling up to this length.
UNROLL_LIMIT = 64
# Grid extents, and so block indices, stay below this (the runtime refuses more).
MAX_GRID = (1 << 31) - 1
_READ, _WRITE = 1, 2
# Scope of a fragment -> use of a cooperative matrix.
FRAGMENTS = {"wmma.matrix_a": 0, "wmma.matrix_b": 1, "wmma.accumulator": 2}
_FRAGMENT_CALLS = ("tirx.tvm_fill_fragment", "tirx.tvm_mma_sync", "tirx.tvm_load_matrix", "tirx.tvm_store_matrix")
_MATRIX_CALLS = ("tirx.tvm_load_matrix_sync", "tirx.tvm_store_matrix_sync")
_JUMPS = ("tirx.break_loop", "tirx.continue_loop")
# The subgroup that TVM's matrix intrinsics assume if the target does not give one.
_MATRIX_WARP = 32


@dataclass
class Access:
    """One load or store: scalar type, lanes, and the facts of its first element index (None: a gather).

    A `tile` is a matrix whose rows begin at `index` plus multiples of its stride, which the divisor of `index` divides.
    """

    dtype: DType
    lanes: int
    index: Fact | None
    tile: bool = False


@dataclass(eq=False)
class Root:
    """A memory: `scope` is global, shared, local or one of FRAGMENTS; `count` its elements, or None if symbolic."""

    name: str
    scope: str
    dtype: DType
    count: int | None
    parameter: int | None = None
    reads: bool = False
    writes: bool = False
    dynamic: bool = False
    atomic: bool = False
    shape: tuple[int, int, int] | None = None
    accesses: list[Access] = field(default_factory=list)


@dataclass(frozen=True)
class View:
    """A buffer: its memory and its element type. `small` says that 31 bits hold every element index."""

    root: Root
    dtype: DType
    small: bool = False


class Analysis:
    """The result of the walk over `function`, a device PrimFunc that TVM lowered for warps of `warp` threads."""

    def __init__(self, function: Any, warp: int) -> None:
        self.facts = Facts()
        self.roots: list[Root] = []
        self.views: dict[int, View] = {}
        self.pointers: dict[int, Root] = {}
        self.threads: dict[str, Any] = {}
        # Loop variables that index local arrays or fragments, which stay in registers if the loop is unrolled.
        self.unroll: set[int] = set()
        # Loop variables of the loops that a break or continue leaves.
        self.left: set[int] = set()
        # Threads of the subgroup that the kernel was lowered for, None if it uses none.
        self.subgroup: int | None = None
        self._warp = warp
        # Loop variable -> bodies per round, if more than one.
        self.copies: dict[int, int] = {}
        self._nest: list[tuple[int, int, int]] = []
        self._starts = 1
        self._loops: list[int] = []
        for index, parameter in enumerate(function.params):
            if hasattr(parameter.ty, "element_type"):
                self._parameter(index, parameter)
        self._visit(function.body)
        counted = [
            Loop(handle, extent, starts, handle not in self.left)
            for handle, extent, starts in self._nest
            if handle not in self.unroll or extent > UNROLL_LIMIT
        ]
        self.copies = copies(counted)
        for root in self.roots:
            if root.parameter is not None and root.scope == "local" and root.reads and not root.writes:
                raise CompileError(
                    f'parameter {root.name} of scope "local" is read and never written; '
                    'memory of a thread ends with its kernel, pass values in scope "global"'
                )

    def _parameter(self, index: int, parameter: Any) -> None:
        element = parameter.ty.element_type
        dtype = from_tvm(element.dtype) if hasattr(element, "dtype") else DType("void", 0)
        if dtype.kind in ("void", "handle"):
            dtype = DType("uint", 32)
        # An allocation outside the launch arrives as a host pointer, but each thread still has its own.
        scope = str(parameter.ty.storage_scope) or "global"
        if scope not in ("global", "local"):
            raise CompileError(f'parameter {parameter.name} has scope "{scope}"; allocate that memory in the kernel')
        root = Root(parameter.name, scope, dtype.scalar, None, index)
        self.roots.append(root)
        self.pointers[parameter.__chandle__()] = root

    # Memories ---------------------------------------------------------------------------------------------------

    def root_of(self, data: Any) -> Root:
        """The memory that a pointer expression refers to."""
        kind = type(data).__name__
        if kind == "Var":
            handle = data.__chandle__()
            if handle in self.views:
                return self.views[handle].root
            if handle in self.pointers:
                return self.pointers[handle]
            raise CompileError(f"the pointer {data.name} has no memory that the kernel knows")
        if kind == "Call":
            return self.root_of(data.args[1 if data.op.name == "tirx.tvm_access_ptr" else 0])
        if kind == "TensorLoad":
            return self.root_of(data.source)
        raise CompileError(f"pointers of kind {kind} are not supported; pass buffers")

    def _view(self, buffer: Any, root: Root) -> None:
        ty = buffer.ty
        count = 1
        for extent in ty.shape:
            size = number(extent)
            count *= 1 << 31 if size is None else size
        lanes = from_tvm(ty.dtype.dtype)
        self.views[buffer.__chandle__()] = View(root, lanes, count * lanes.lanes < 1 << 31)

    def _allocate(self, buffer: Any) -> None:
        ty = buffer.ty
        scope = str(ty.storage_scope) or "local"
        dtype = from_tvm(ty.dtype.dtype)
        count = self._elements(buffer)
        kind = scope if scope in FRAGMENTS else scope.split(".")[0]
        if kind not in ("shared", "local", *FRAGMENTS):
            raise CompileError(
                f'buffer {buffer.name} has scope "{scope}"; kernels may allocate "local" and "shared" memory'
            )
        if count is None and scope != "shared.dyn":
            raise _unbounded(buffer)
        root = Root(buffer.name, kind, dtype.scalar, count, dynamic=scope == "shared.dyn")
        self.roots.append(root)
        self._view(buffer, root)

    def _elements(self, buffer: Any) -> int | None:
        """Upper bound of a buffer's scalars, None if there is none."""
        count: int | None = from_tvm(buffer.ty.dtype.dtype).lanes
        for extent in buffer.ty.shape:
            size = self.facts.most_elements(extent)
            count = None if size is None or count is None else count * size
        return count

    # The walk ---------------------------------------------------------------------------------------------------

    def _visit(self, node: Any) -> None:
        method = getattr(self, "_" + type(node).__name__, None)
        if method is not None:
            method(node)
            return
        for name in _CHILDREN.get(type(node).__name__, ()):
            child = getattr(node, name)
            if child is not None:
                self._visit(child)

    def _SeqStmt(self, node: Any) -> None:
        for statement in node.seq:
            self._visit(statement)

    def _AttrStmt(self, node: Any) -> None:
        if node.attr_key in ("thread_extent", "virtual_thread"):
            tag, extent = str(node.node.thread_tag), node.value
            high = (number(extent) or MAX_GRID) - 1
            self.facts.bind(node.node.var, Fact(0, high, 0 if high == 0 else 1))
            self.threads.setdefault(tag, extent)
        self._visit(node.value)
        self._visit(node.body)

    def _For(self, node: Any) -> None:
        low, extent = self.facts.of(node.min), self.facts.of(node.extent)
        step = number(node.step) or 1
        divisor = step if low.low == low.high and low.low % step == 0 else 1
        self.facts.bind(node.loop_var, Fact(low.low, low.high + max(extent.high - 1, 0), divisor))
        self._visit(node.min)
        self._visit(node.extent)
        handle, before = node.loop_var.__chandle__(), self._starts
        count = number(node.extent) if node.step is None else None
        if count is not None and count > 1:
            self._nest.append((handle, count, before))
            self._starts *= count
        self._loops.append(handle)
        self._visit(node.body)
        self._loops.pop()
        self._starts = before

    def _While(self, node: Any) -> None:
        self._visit(node.condition)
        self._loops.append(0)
        self._visit(node.body)
        self._loops.pop()

    def _Break(self, node: Any) -> None:
        self.left.update(self._loops[-1:])

    _Continue = _Break

    def _bind(self, var: Any, value: Any) -> None:
        if hasattr(var.ty, "element_type"):
            self.pointers[var.__chandle__()] = self.root_of(value)
        elif var.ty.dtype.type_code in (0, 1) and var.ty.dtype.lanes == 1:
            self.facts.bind(var, self.facts.of(value))
        self._visit(value)

    def _Bind(self, node: Any) -> None:
        self._bind(node.var, node.value)

    def _Let(self, node: Any) -> None:
        self._bind(node.var, node.value)
        self._visit(node.body)

    def _AllocBuffer(self, node: Any) -> None:
        self._allocate(node.buffer)

    def _DeclBuffer(self, node: Any) -> None:
        root = self.root_of(node.data)
        if root.parameter is not None and root.scope == "local":
            count = self._elements(node.buffer)
            if count is None:
                raise _unbounded(node.buffer)
            size = count * from_tvm(node.buffer.ty.dtype.dtype).bytes
            root.count = max(root.count or 0, -(-size // root.dtype.bytes))
        self._view(node.buffer, root)

    def _TensorLoad(self, node: Any) -> None:
        self._access(node.source, node.indices, _READ)

    def _BufferStore(self, node: Any) -> None:
        self._access(node.buffer, node.indices, _WRITE)
        self._visit(node.value)

    def _access(self, buffer: Any, indices: Any, mode: int) -> None:
        view = self.views.get(buffer.__chandle__())
        if view is None:
            raise CompileError(f"buffer {buffer.name} is used but never declared")
        root = view.root
        root.reads |= bool(mode & _READ)
        root.writes |= bool(mode & _WRITE)
        index = indices[-1]
        lanes = view.dtype.lanes
        fact: Fact | None = None
        if type(index).__name__ == "Ramp":
            count = number(index.lanes)
            if count is None:
                raise CompileError(f"buffer {buffer.name} is read in vectors whose length is not constant")
            if number(index.stride) == 1:
                base = self.facts.of(index.base)
                lanes *= count
                fact = _scaled(base, view.dtype.lanes)
        elif index.ty.dtype.lanes == 1:
            fact = _scaled(self.facts.of(index), view.dtype.lanes)
        root.accesses.append(Access(view.dtype.scalar, lanes, fact))
        if root.scope == "local":
            self.unroll.update(_variables(index).intersection(self._loops))
        for item in indices:
            self._visit(item)

    def _Shuffle(self, node: Any) -> None:
        for vector in node.vectors:
            self._visit(vector)

    def _Call(self, node: Any) -> None:
        name = getattr(node.op, "name", "")
        if name.startswith(_FRAGMENT_CALLS):
            self.subgroup = max(self.subgroup or 1, self._warp if self._warp > 1 else _MATRIX_WARP)
            places = node.args[1::2] if name.endswith("mma_sync") else node.args[4:5]
            for place in places:
                self.unroll.update(_variables(place).intersection(self._loops))
        if name.startswith("tirx.tvm_warp_shuffle"):
            self.subgroup = max(self.subgroup or 1, number(node.args[4]) or 1)
        elif self._warp > 1 and name == "tirx.tvm_storage_sync" and text(node.args[0]) == "warp":
            self.subgroup = max(self.subgroup or 1, self._warp)
        if name in _JUMPS:
            self._Break(node)
        elif name in _MATRIX_CALLS:
            self._tile(node.args[5], node.args[6], _READ if "load" in name else _WRITE)
        elif name == "tirx.address_of":
            self._pointer_use(node.args[0], _READ | _WRITE)
        elif name == "tirx.tvm_access_ptr":
            self._pointer_use(node, number(node.args[4]) or _READ | _WRITE)
            self._visit(node.args[2])
        else:
            for argument in node.args:
                self._visit(argument)

    def _tile(self, pointer: Any, stride: Any, mode: int) -> None:
        name = getattr(getattr(pointer, "op", None), "name", "")
        root = self.root_of(pointer)
        root.reads |= bool(mode & _READ)
        root.writes |= bool(mode & _WRITE)
        if name == "tirx.address_of":
            load = pointer.args[0]
            dtype, place = self.views[load.source.__chandle__()].dtype.scalar, load.indices[-1]
        else:
            dtype, place = from_tvm(pointer.args[0].ty.dtype).scalar, pointer.args[2]
        offset, step = self.facts.of(place), self.facts.of(stride)
        self._visit(place)
        fact = Fact(offset.low, offset.high, gcd(offset.divisor, step.divisor))
        root.accesses.append(Access(dtype, 4, fact, tile=True))

    def _pointer_use(self, pointer: Any, mode: int) -> None:
        root = self.root_of(pointer)
        root.reads |= bool(mode & _READ)
        root.writes |= bool(mode & _WRITE)
        root.atomic = True
        if type(pointer).__name__ == "TensorLoad":
            view = self.views[pointer.source.__chandle__()]
            root.accesses.append(Access(view.dtype.scalar, 1, self.facts.of(pointer.indices[-1])))
            for index in pointer.indices:
                self._visit(index)
        else:
            root.accesses.append(Access(from_tvm(pointer.args[0].ty.dtype).scalar, 1, None))


def _unbounded(buffer: Any) -> CompileError:
    return CompileError(
        f'buffer {buffer.name} has a size without a constant bound; only memory of scope "shared.dyn" may'
    )


def _variables(expr: Any) -> set[int]:
    """Handles of the variables in an index."""
    found: set[int] = set()
    work = [expr]
    while work:
        node = work.pop()
        if type(node).__name__ == "Var":
            found.add(node.__chandle__())
        work.extend(getattr(node, name) for name in _CHILDREN.get(type(node).__name__, ()))
    return found


def _scaled(fact: Fact, lanes: int) -> Fact:
    """An index counted in elements of a vector type, converted to scalars."""
    return Fact(fact.low * lanes, fact.high * lanes, fact.divisor * lanes) if lanes > 1 else fact


_BINARY = dict.fromkeys(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Mod",
        "FloorDiv",
        "FloorMod",
        "Min",
        "Max",
        "EQ",
        "NE",
        "LT",
        "LE",
        "GT",
        "GE",
        "And",
        "Or",
        "LShift",
        "RShift",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
    ],
    ("a", "b"),
)
_CHILDREN: dict[str, tuple[str, ...]] = {
    **_BINARY,
    "Not": ("a",),
    "BitwiseNot": ("a",),
    "Cast": ("value",),
    "Select": ("condition", "true_value", "false_value"),
    "Ramp": ("base", "stride"),
    "Broadcast": ("value",),
    "Evaluate": ("value",),
    "IfThenElse": ("condition", "then_case", "else_case"),
    "AssertStmt": ("condition",),
}
