"""Loads and stores: buffers by device address, shared and local arrays, vectors, dynamic shared memory.

* A global buffer is a pointer in the argument block to `struct { T[]; }`, and an element an OpAccessChain. T is the
  scalar or vector of 2 or 4 that is accessed; a buffer that is accessed as several types has a pointer for each, as not
  every driver can cast pointers. Loads state the alignment that is proven, never more.
* A shared or local array holds scalars, or vectors of 2 or 4 if every vector access is aligned to them; single elements
  of a shared vector are addressed by component, so that threads may write neighbouring ones.
* Views of one allocation with another element size are assembled from elements of the smallest size.
* An earlier load is reused until a store, a barrier or a loop may have changed the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import NamedTuple

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.analysis import FRAGMENTS, Access, Analysis, Root, View
from tvm_attn.vulkan.codegen.arithmetic import Arithmetic
from tvm_attn.vulkan.codegen.facts import UNKNOWN, Fact
from tvm_attn.vulkan.codegen.values import MAX_LANES, DType, Value, split

_BYTE = DType("uint", 8)


class Index(NamedTuple):
    """The place of an access: `base` in scalars of the view, `fact` about it; `gather` instead for scattered lanes."""

    base: Value | None
    fact: Fact
    gather: tuple[Value, ...] = ()


class Form(NamedTuple):
    """How elements of a global memory are accessed: `width` scalars of type `dtype` at a time."""

    dtype: DType
    width: int


@dataclass(eq=False)
class Array:
    """A shared or local array: its variable, unit type, units per vector, and the units before its first."""

    variable: int
    storage: str
    unit: DType
    width: int
    offset: int
    length: int
    root: Root


class Memory:
    """All memories of a kernel."""

    def __init__(self, arithmetic: Arithmetic, analysis: Analysis) -> None:
        self.arith = arithmetic
        self.builder = arithmetic.builder
        self._analysis = analysis
        self._bases: dict[tuple[Root, Form], int] = {}
        self._arrays: dict[Root, list[tuple[int, int, Array]]] = {}
        self._any: dict[Root, int] = {}
        self._dynamic: dict[Root, int] = {}
        self._slots: dict[tuple[Root, int], int] = {}
        self._clock = 0
        self.vulkan_model = any(root.scope in FRAGMENTS for root in analysis.roots)
        self.shared_bytes = 0

    # Declaration ------------------------------------------------------------------------------------------------

    def forms(self, root: Root) -> list[Form]:
        """The forms in which a parameter's memory is accessed, at least one: each needs its own pointer."""
        if root.scope != "global":  # every thread has its own, and the address is not used
            return [_form(root.dtype)]
        found = []
        for access in root.accesses:
            fact = UNKNOWN if access.tile or access.index is None else access.index
            found.append(_form(access.dtype, access.lanes, fact))
            if root.atomic:  # A comparing exchange works on integers.
                found += [_form(access.dtype), _form(DType("uint", access.dtype.bits))]
        return list(dict.fromkeys(found)) or [_form(root.dtype)]

    def global_type(self, form: Form) -> int:
        """The type of the pointer to a global memory, as the argument block holds it."""
        b = self.builder
        dtype, width = form
        runtime_array = b.array(self.arith.type(dtype, width), 0, dtype.bytes * width)
        return b.pointer("PhysicalStorageBuffer", b.block_struct([(runtime_array, 0)]))

    def set_base(self, root: Root, form: Form, pointer: int) -> None:
        """Binds a global memory to its pointer for accesses of a form."""
        self._bases[root, form] = pointer

    @staticmethod
    def stored(dtype: DType) -> DType:
        return _BYTE.with_lanes(dtype.lanes) if dtype.kind == "bool" else dtype

    def _regions(self, root: Root) -> list[tuple[int, int, Array]]:
        """The arrays that represent a shared or local allocation: (first byte, end, array)."""
        if root not in self._arrays:
            self._arrays[root] = [self._declare(root, *region) for region in _partition(root)]
        return self._arrays[root]

    def _declare(self, root: Root, low: int, high: int | None, accesses: list[Access]) -> tuple[int, int, Array]:
        b = self.builder
        storage = "Workgroup" if root.scope == "shared" else "Function"
        unit = min((access.dtype for access in accesses), key=lambda dtype: dtype.bytes, default=root.dtype)
        kinds = {access.dtype for access in accesses}
        if unit.kind == "bool" and len(kinds) > 1:
            unit = _BYTE
        if low % unit.bytes:
            raise CompileError(f"a view of buffer {root.name} starts within an element")
        if root.atomic and unit.kind == "float":
            unit = DType("uint", unit.bits)
        width = 1 if root.atomic else _vector_width(root, accesses, unit, low)
        if high is None:
            words = b.int_(32)
            size = self.builder.spec_constant(words, 1, 4)
            per_element = b.uint(unit.bytes * width)
            length_id = b.spec_constant_op(134, words, size, per_element)  # OpUDiv
            length = 0
        else:
            length = -(-(high - low) // (unit.bytes * width))
            length_id = b.uint(length)
            if root.scope == "shared" and not root.dynamic:
                self.shared_bytes += length * unit.bytes * width
        element = self.arith.type(unit, width)
        single = length == 1 and storage == "Function"
        variable = b.variable(storage, element if single else b.array(element, length_id), root.name)
        array = Array(variable, storage, unit, width, low // unit.bytes, length, root)
        return low, high if high is not None else 1 << 62, array

    # Access -----------------------------------------------------------------------------------------------------

    def load(self, view: View, index: Index, dtype: DType) -> Value:
        """The value at `index`, of type `dtype` (its lanes are those of the access)."""
        if index.base is None:
            lanes = [self.load(view, Index(item, Fact()), dtype.scalar).id for item in index.gather]
            return self.arith.build(dtype, lanes)
        stored = self.stored(dtype) if view.root.scope == "global" else dtype
        if view.root.scope == "global":
            value = self._load_global(view.root, index, stored)
        else:
            value = self._load_array(self._find(view.root, index, stored), index, stored)
        return self.arith.cast(value, dtype) if stored != dtype else value

    def store(self, view: View, index: Index, value: Value) -> None:
        """Writes `value` at `index`."""
        if index.base is None:
            for lane, item in zip(self.arith.lanes(value), index.gather, strict=True):
                self.store(view, Index(item, Fact()), Value(value.dtype.scalar, [lane]))
            return
        root = view.root
        if root.scope == "global":
            stored = self.stored(value.dtype)
            self._store_global(root, index, self.arith.cast(value, stored) if stored != value.dtype else value)
            self._touch(root)
        else:
            self._store_array(self._find(root, index, value.dtype), index, self.arith.wide(value))

    def pointer(self, view: View, index: Index, dtype: DType) -> int:
        """The pointer to one element, for atomics and matrices."""
        assert index.base is not None
        root = view.root
        self._touch(root)
        if root.scope == "global":
            return self._global_element(root, index.base, _form(dtype))
        array = self._find(root, index, dtype)
        if self.arith.type(array.unit) != self.arith.type(dtype):
            raise CompileError(f"atomics on buffer {root.name} need elements of type {array.unit}, not {dtype}")
        return self._unit_pointer(array, index.base)

    def tile(self, view: View, index: Index, dtype: DType) -> tuple[int, Fraction]:
        """The pointer to the first element of a matrix in memory, and the distance to the next, in what it points to.

        The array's elements may have another type than the matrix's: they are taken as bits.
        """
        assert index.base is not None
        if view.root.writes:
            self._touch(view.root)
        if view.root.scope == "global":
            return self._global_element(view.root, index.base, _form(dtype)), Fraction(1)
        array = self._find(view.root, index, dtype)
        ratio = dtype.bytes // array.unit.bytes
        base = self._in_units(index, ratio).base
        assert base is not None
        if array.width == 1:
            return self._unit_pointer(array, base), Fraction(ratio)
        vector = self._shifted(self._offset(base, -array.offset), array.width)
        return self._chain(array, self.arith.type(array.unit, array.width), vector.id), Fraction(ratio, array.width)

    def invalidate(self, scope: str | None = None) -> None:
        """Forgets loads of memory that is written: of `scope`, or of all memories (at loops)."""
        for root in self._analysis.roots:
            if root.writes and scope in (None, root.scope):
                self._touch(root)

    def _touch(self, root: Root) -> None:
        self._clock += 1
        self._any[root] = self._dynamic[root] = self._clock

    # Global memory ----------------------------------------------------------------------------------------------

    def _global_element(self, root: Root, base: Value, form: Form) -> int:
        """The pointer to the element at `base`, which counts scalars and is a multiple of the form's width."""
        b = self.builder
        pointer = self._bases.get((root, form))
        if pointer is None:
            raise CompileError(f"an access of buffer {root.name} as {form.dtype} was not expected")
        element = b.pointer("PhysicalStorageBuffer", self.arith.type(*form))
        return b.op("AccessChain", element, pointer, b.uint(0), self._shifted(base, form.width).id)

    def _global_parts(self, root: Root, index: Index, form: Form, lanes: int) -> list[int]:
        """The pointers to the parts of a contiguous access."""
        assert index.base is not None
        return [
            self._global_element(root, self._offset(index.base, start), form) for start in range(0, lanes, form.width)
        ]

    def _load_global(self, root: Root, index: Index, dtype: DType) -> Value:
        epoch = (self._any.get(root, 0),) if root.writes else None
        form = _form(dtype, dtype.lanes, index.fact)
        ids = [
            self.builder.op("Load", self.arith.type(*form), pointer, *self._aligned(root, form), epoch=epoch)
            for pointer in self._global_parts(root, index, form, dtype.lanes)
        ]
        return self._join(dtype, ids, (form.width,) * len(ids))

    def _store_global(self, root: Root, index: Index, value: Value) -> None:
        lanes = value.dtype.lanes
        form = _form(value.dtype, lanes, index.fact)
        pointers = self._global_parts(root, index, form, lanes)
        for pointer, ident in zip(pointers, self._cut(value, (form.width,) * len(pointers)), strict=True):
            self.builder.emit("Store", None, pointer, ident, *self._aligned(root, form))

    def _join(self, dtype: DType, ids: Sequence[int], widths: tuple[int, ...]) -> Value:
        """The value whose lanes are those of consecutive vectors."""
        if widths == split(dtype.lanes):
            return Value(dtype, ids)
        lanes: list[int] = []
        for ident, width in zip(ids, widths, strict=True):
            lanes += self.arith.lanes(Value(dtype.with_lanes(width), [ident]))
        return self.arith.build(dtype, lanes)

    def _cut(self, value: Value, widths: tuple[int, ...]) -> Sequence[int]:
        """The lanes of a value as consecutive vectors."""
        if widths == split(value.dtype.lanes):
            return self.arith.wide(value).parts
        lanes, start, ids = self.arith.lanes(value), 0, []
        for width in widths:
            ids.append(self.arith.build(value.dtype.with_lanes(width), lanes[start : start + width]).id)
            start += width
        return ids

    def _aligned(self, root: Root, form: Form) -> tuple[str, int]:
        """The memory operands for global memory: the Vulkan memory model must be told what threads exchange."""
        exchanged = self.vulkan_model and root.reads and root.writes
        return "Aligned|NonPrivatePointer" if exchanged else "Aligned", min(form.dtype.bytes * form.width, 16)

    def _exchanged(self, root: Root) -> tuple[str, ...]:
        return ("NonPrivatePointer",) if self.vulkan_model and root.scope == "shared" else ()

    # Shared and local memory ------------------------------------------------------------------------------------

    def _find(self, root: Root, index: Index, dtype: DType) -> Array:
        regions = self._regions(root)
        position = index.fact.low * dtype.bytes
        for low, high, array in regions:
            if len(regions) == 1 or low <= position < high:
                return array
        raise CompileError(f"an access of buffer {root.name} is out of bounds")

    def _offset(self, base: Value, amount: int) -> Value:
        if amount == 0:
            return base
        return self.arith.binary("add", base, self.arith.constant(base.dtype, amount))

    def _chain(self, array: Array, element_type: int, *indices: int) -> int:
        b = self.builder
        pointer = b.pointer(array.storage, element_type)
        if array.length == 1 and array.storage == "Function":
            indices = indices[1:]
        return b.op("AccessChain", pointer, array.variable, *indices) if indices else array.variable

    def _unit_pointer(self, array: Array, base: Value) -> int:
        """The pointer to the unit `base` of the view."""
        base = self._offset(base, -array.offset)
        element = self.arith.type(array.unit)
        if array.width == 1:
            return self._chain(array, element, base.id)
        vector = self._shifted(base, array.width)
        mask = self.arith.constant(base.dtype, array.width - 1)
        literal = self.arith.literal(base)
        component = (
            self.arith.binary("and", base, mask)
            if literal is None
            else self.arith.constant(base.dtype, int(literal) % array.width)
        )
        return self._chain(array, element, vector.id, component.id)

    def _shifted(self, base: Value, width: int) -> Value:
        literal = self.arith.literal(base)
        if width == 1:
            return base
        if literal is not None:
            return self.arith.constant(base.dtype, int(literal) // width)
        return self.arith.binary("shr", base, self.arith.constant(base.dtype, width.bit_length() - 1))

    def _pieces(self, array: Array, index: Index, lanes: int) -> list[tuple[int, int, int, int | None]]:
        """(pointer, type, units, slot) of each piece of an access to `lanes` consecutive units; slots are constant."""
        base = index.base
        assert base is not None
        literal = self.arith.literal(base)
        if literal is not None and literal >= 1 << 31:
            raise CompileError(f"an access of buffer {array.root.name} is out of bounds")
        aligned = gcd(index.fact.divisor, array.offset) % array.width == 0
        whole = array.width > 1 and lanes % array.width == 0 and aligned
        pieces: list[tuple[int, int, int, int | None]] = []
        step = array.width if whole else 1
        for start in range(0, lanes, step):
            place = self._offset(base, start)
            if whole:
                vector = self._shifted(self._offset(place, -array.offset), array.width)
                type_id = self.arith.type(array.unit, array.width)
                pointer = self._chain(array, type_id, vector.id)
            else:
                type_id, pointer = self.arith.type(array.unit), self._unit_pointer(array, place)
            pieces.append((pointer, type_id, step, None if literal is None else (int(literal) + start) // array.width))
        return pieces

    def _epoch(self, root: Root, slot: int | None) -> tuple[int, int]:
        dynamic = self._dynamic.get(root, 0)
        return (dynamic, self._any.get(root, 0) if slot is None else self._slots.get((root, slot), 0))

    def _load_array(self, array: Array, index: Index, dtype: DType) -> Value:
        ratio = dtype.bytes // array.unit.bytes
        units = dtype.lanes * ratio
        pieces = self._pieces(array, self._in_units(index, ratio), units)
        ids = [
            self.builder.op("Load", type_id, pointer, *self._exchanged(array.root), epoch=self._epoch(array.root, slot))
            for pointer, type_id, _, slot in pieces
        ]
        raw = array.unit.with_lanes(units)
        value = self._join(raw, ids, tuple(width for _, _, width, _ in pieces))
        return value if raw == dtype else self._reinterpret(value, dtype)

    def _store_array(self, array: Array, index: Index, value: Value) -> None:
        root = array.root
        ratio = value.dtype.bytes // array.unit.bytes
        units = value.dtype.lanes * ratio
        raw = array.unit.with_lanes(units)
        if raw != value.dtype:
            value = self._reinterpret(value, raw)
        pieces = self._pieces(array, self._in_units(index, ratio), units)
        ids = self._cut(value, tuple(width for _, _, width, _ in pieces))
        for ident, (pointer, type_id, width, slot) in zip(ids, pieces, strict=True):
            self.builder.emit("Store", None, pointer, ident, *self._exchanged(root))
            self._clock += 1
            self._any[root] = self._clock
            if slot is None or root.scope == "shared":
                self._dynamic[root] = self._clock
            else:
                self._slots[root, slot] = self._clock
            if root.scope == "local" and width == array.width:
                self.builder.remember(ident, "Load", type_id, pointer, epoch=self._epoch(root, slot))

    def _in_units(self, index: Index, ratio: int) -> Index:
        if ratio == 1:
            return index
        if ratio == 0:
            raise AssertionError("the unit of an array is its smallest element")
        assert index.base is not None
        base = self.arith.binary("mul", index.base, self.arith.constant(index.base.dtype, ratio))
        fact = index.fact
        return Index(base, Fact(fact.low * ratio, fact.high * ratio, fact.divisor * ratio))

    def _reinterpret(self, value: Value, dtype: DType) -> Value:
        if dtype.kind == "bool":
            return self.arith.compare("ne", value, self.arith.constant(value.dtype, 0))
        if value.dtype.kind == "bool":
            value = self.arith.cast(value, _BYTE.with_lanes(value.dtype.lanes))
        return self.arith.bitcast(value, dtype)


def _form(dtype: DType, lanes: int = 1, fact: Fact = UNKNOWN) -> Form:
    """The form for `lanes` consecutive elements from an index with that fact. Integers have no sign in memory."""
    stored = Memory.stored(dtype.scalar)
    scalar = DType("uint", stored.bits) if stored.kind in ("int", "bfloat") else stored
    return Form(scalar, Fact(divisor=gcd(fact.divisor, lanes)).aligned(MAX_LANES))


def _partition(root: Root) -> list[tuple[int, int | None, list[Access]]]:
    """Splits an allocation into (first byte, end, accesses): ranges that no access crosses.

    Only dynamic shared memory is split: TVM merges the shared buffers of a kernel into one allocation.
    """
    whole = root.dtype.bytes * root.count if root.count is not None else None
    if not root.dynamic:
        return [(0, whole, root.accesses)]
    ranges: list[tuple[int, int, list[Access]]] = []
    for access in root.accesses:
        if access.index is None or access.index.low < 0 or access.index.high >= 1 << 31 or whole is None:
            return [(0, whole, root.accesses)]
        first = access.index.low * access.dtype.bytes
        last = (access.index.high + access.lanes) * access.dtype.bytes
        ranges.append((first, last, [access]))
    ranges.sort(key=lambda item: item[0])
    merged: list[tuple[int, int | None, list[Access]]] = []
    for first, last, accesses in ranges:
        if merged and first < (merged[-1][1] or 0):
            low, high, others = merged[-1]
            merged[-1] = (low, max(high or 0, last), others + accesses)
        else:
            merged.append((first, last, accesses))
    return merged


def _vector_width(root: Root, accesses: list[Access], unit: DType, low: int) -> int:
    """4 or 2 if the vector accesses of an array are aligned to it, else 1."""
    if unit.kind == "bool":
        return 1
    best, limit = 0, 4
    for access in accesses:
        lanes = access.lanes * (access.dtype.bytes // unit.bytes)
        if lanes == 1 or access.index is None:
            if root.scope == "local":
                return 1
            continue
        divisor = gcd(access.index.divisor * (access.dtype.bytes // unit.bytes), low // unit.bytes)
        aligned = Fact(divisor=gcd(divisor, lanes)).aligned(4)
        if access.tile:
            limit = min(limit, aligned)
        best = max(best, aligned) if root.scope == "shared" else min(best or 4, aligned)
    return max(min(best, limit), 1)
