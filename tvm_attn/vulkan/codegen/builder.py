"""A small typed builder for SPIR-V compute modules: one entry point, structured control flow, shared values.

It knows nothing about TIR. Types and constants exist once. A pure instruction is not emitted again if a block that
dominates the current one already has it (`op`; dominance follows the nesting of `branch`, `select` and `loop`).
Encoding drops whatever nothing reads, and declares the capabilities that the rest needs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from tvm_attn.vulkan.codegen import encoding
from tvm_attn.vulkan.codegen.encoding import Instr, Type
from tvm_attn.vulkan.codegen.spirv import BUILTIN, EFFECTS, SEMANTICS, TERMINATORS

Operand = int | str
_FLOAT_FORMAT = {16: "<e", 32: "<f", 64: "<d"}


class Builder:
    """Builds the module of one compute kernel; `finish` encodes it."""

    def __init__(self) -> None:
        self._next = 1
        self._memo: dict[tuple[object, ...], int] = {}
        self.types: dict[int, Type] = {}
        self.type_of: dict[int, int] = {}
        self.constants: dict[int, int | float | bool] = {}
        self._globals: list[Instr] = []
        self._decorations: list[Instr] = []
        self._names: list[Instr] = []
        self._locals: list[Instr] = []
        self._body: list[Instr] = []
        self._numbers: dict[tuple[object, ...], int] = {}
        self._trail: list[tuple[object, ...]] = []
        self._marks: list[int] = []
        self._loops: list[tuple[int, int]] = []
        self._extra_capabilities: set[str] = set()
        self.vulkan_memory_model = False
        self._glsl = self.new_id()
        self._main = self.new_id()
        self.block = self.new_id()
        self.terminated = False
        self._entry = self.block

    def new_id(self) -> int:
        """An unused result id."""
        value = self._next
        self._next += 1
        return value

    # Types ------------------------------------------------------------------------------------------------------

    def _type(self, info: Type, name: str, *operands: Operand, key: object = None) -> int:
        memo = ("type", info, key)
        if memo not in self._memo:
            result = self.new_id()
            self._globals.append((name, None, result, operands))
            self.types[result] = info
            self._memo[memo] = result
        return self._memo[memo]

    def void(self) -> int:
        return self._type(Type("void"), "TypeVoid")

    def bool_(self) -> int:
        return self._type(Type("bool"), "TypeBool")

    def int_(self, bits: int) -> int:
        """Integers have no sign: the instructions do."""
        return self._type(Type("int", bits), "TypeInt", bits, 0)

    def float_(self, bits: int) -> int:
        return self._type(Type("float", bits), "TypeFloat", bits)

    def vector(self, element: int, count: int) -> int:
        """A vector of `count` components; 1 gives the scalar itself."""
        return element if count == 1 else self._type(Type("vector", count, element), "TypeVector", element, count)

    def pointer(self, storage: str, element: int) -> int:
        return self._type(Type("pointer", 0, element, storage), "TypePointer", storage, element)

    def array(self, element: int, length: int, stride: int = 0) -> int:
        """An array of `length`, the id of a constant (0: open ended); `stride` in bytes, for memory with a layout."""
        info = Type("array", length, element)
        known = ("type", info, stride) in self._memo
        if length:
            result = self._type(info, "TypeArray", element, length, key=stride)
        else:
            result = self._type(info, "TypeRuntimeArray", element, key=stride)
        if stride and not known:
            self.decorate(result, "ArrayStride", stride)
        return result

    def block_struct(self, members: Sequence[tuple[int, int]]) -> int:
        """A struct with a block's layout, from members (type, byte offset)."""
        key = tuple(members)
        known = ("type", Type("struct"), key) in self._memo
        result = self._type(Type("struct"), "TypeStruct", *(member for member, _ in members), key=key)
        if not known:
            self.decorate(result, "Block")
            for index, (_, offset) in enumerate(members):
                self._decorations.append(("MemberDecorate", None, None, (result, index, "Offset", offset)))
        return result

    def cooperative_matrix(self, component: int, rows: int, columns: int, use: int) -> int:
        """A KHR cooperative matrix of the subgroup; use 0 is A, 1 is B, 2 the accumulator."""
        info = Type("matrix", 0, component)
        operands = [self.uint(value) for value in (3, rows, columns, use)]
        return self._type(info, "TypeCooperativeMatrixKHR", component, *operands, key=(rows, columns, use))

    def scalar(self, type_id: int) -> Type:
        """The scalar type that values of `type_id` are made of."""
        info = self.types[type_id]
        return self.types[info.element] if info.kind in ("vector", "matrix") else info

    def count(self, type_id: int) -> int:
        """Number of components."""
        info = self.types[type_id]
        return info.size if info.kind == "vector" else 1

    # Constants --------------------------------------------------------------------------------------------------

    def constant(self, type_id: int, value: int | float | bool) -> int:
        """A constant; for a vector type, with all components equal. Integers wrap to their width."""
        info = self.types[type_id]
        if info.kind == "vector":
            return self.composite(type_id, [self.constant(info.element, value)] * info.size)
        if info.kind == "bool":
            words: tuple[int, ...] = ()
            name = "ConstantTrue" if value else "ConstantFalse"
        else:
            name = "Constant"
            if info.kind == "int":
                value = int(value) & ((1 << info.size) - 1)
                raw = value
            else:
                packed = struct.pack(_FLOAT_FORMAT[info.size], _representable(float(value), info.size))
                raw = int.from_bytes(packed, "little")
            words = (raw & 0xFFFFFFFF,) if info.size <= 32 else (raw & 0xFFFFFFFF, raw >> 32)
        memo = (name, type_id, words)
        if memo not in self._memo:
            result = self._global(name, type_id, *words)
            self.constants[result] = bool(value) if info.kind == "bool" else value
            self._memo[memo] = result
        return self._memo[memo]

    def uint(self, value: int) -> int:
        """A 32-bit integer constant."""
        return self.constant(self.int_(32), value)

    def true(self) -> int:
        return self.constant(self.bool_(), True)

    def composite(self, type_id: int, parts: Sequence[int]) -> int:
        """A vector of scalars: a constant if all of them are."""
        if all(part in self.constants for part in parts):
            result = self._once("ConstantComposite", type_id, *parts)
            if len(set(parts)) == 1:
                self.constants[result] = self.constants[parts[0]]
            return result
        return self.op("CompositeConstruct", type_id, *parts)

    def spec_constant(self, type_id: int, number: int, default: int) -> int:
        """The specialization constant with that number; `default` is 0 for a bool."""
        memo = ("spec", number)
        if memo not in self._memo:
            if self.types[type_id].kind == "bool":
                result = self._global("SpecConstantFalse", type_id)
            else:
                result = self._global("SpecConstant", type_id, default)
            self.decorate(result, "SpecId", number)
            self._memo[memo] = result
        return self._memo[memo]

    def spec_constant_op(self, opcode: int, type_id: int, *operands: int) -> int:
        """A constant computed from specialization constants by the instruction with number `opcode`."""
        return self._once("SpecConstantOp", type_id, opcode, *operands)

    def _global(self, name: str, type_id: int, *operands: Operand) -> int:
        result = self.new_id()
        self._globals.append((name, type_id, result, operands))
        self.type_of[result] = type_id
        return result

    def _once(self, name: str, type_id: int, *operands: Operand) -> int:
        memo = (name, type_id, operands)
        if memo not in self._memo:
            self._memo[memo] = self._global(name, type_id, *operands)
        return self._memo[memo]

    # Variables --------------------------------------------------------------------------------------------------

    def variable(self, storage: str, type_id: int, name: str = "") -> int:
        """A module variable, or a function variable if `storage` is "Function"; the result is a pointer."""
        result, pointer = self.new_id(), self.pointer(storage, type_id)
        target = self._locals if storage == "Function" else self._globals
        target.append(("Variable", pointer, result, (storage,)))
        self.type_of[result] = pointer
        if name:
            self.name(result, name)
        return result

    def builtin(self, name: str, type_id: int) -> int:
        """The value of an input built-in, read once."""
        memo = ("builtin", name)
        if memo not in self._memo:
            variable = self.variable("Input", type_id, name)
            self._decorations.append(("Decorate", None, None, (variable, "BuiltIn", BUILTIN[name])))
            self._memo[memo] = variable
        return self.op("Load", type_id, self._memo[memo])

    def decorate(self, target: int, decoration: str, *parameters: int) -> None:
        self._decorations.append(("Decorate", None, None, (target, decoration, *parameters)))

    def name(self, target: int, name: str) -> None:
        self._names.append(("Name", None, None, (target, name)))

    def require(self, *capabilities: str) -> None:
        """Declares capabilities that do not follow from types and instructions."""
        self._extra_capabilities.update(capabilities)

    # Instructions -----------------------------------------------------------------------------------------------

    def emit(self, name: str, type_id: int | None, *operands: Operand) -> int:
        """Appends an instruction unchanged. Returns its result id, or 0 if it has none."""
        result = 0
        if type_id is not None:
            result = self.new_id()
            self.type_of[result] = type_id
        self._body.append((name, type_id, result or None, operands))
        if name in TERMINATORS:
            self.terminated = True
        return result

    def op(self, name: str, type_id: int, *operands: Operand, epoch: object = None) -> int:
        """A pure instruction, shared with an equal one that dominates this place.

        `epoch` distinguishes loads from memory that changes: two loads are equal if their epochs are.
        """
        key = (name, type_id, operands, epoch)
        known = self._numbers.get(key)
        if known is not None:
            return known
        result = self.new_id()
        self.type_of[result] = type_id
        self._body.append((name, type_id, result, operands))
        self._numbers[key] = result
        self._trail.append(key)
        return result

    def remember(self, value: int, name: str, type_id: int, *operands: Operand, epoch: object = None) -> None:
        """From now on, `op` with these arguments returns `value`."""
        key = (name, type_id, operands, epoch)
        if key not in self._numbers:
            self._trail.append(key)
            self._numbers[key] = value

    def glsl(self, function: str, type_id: int, *operands: int) -> int:
        """An instruction of GLSL.std.450."""
        return self.op("ExtInst", type_id, self._glsl, function, *operands)

    def exact(self, name: str, type_id: int, *operands: Operand) -> int:
        """Float arithmetic that must not be contracted or reassociated."""
        result = self.op(name, type_id, *operands, epoch="exact")
        memo = ("exact", result)
        if memo not in self._memo:
            self._memo[memo] = result
            self.decorate(result, "NoContraction")
        return result

    def barrier(self, execution: int, memory: int, semantics: Sequence[str]) -> None:
        """OpControlBarrier with scopes as numbers and semantics as names."""
        bits = sum(SEMANTICS[name] for name in semantics)
        self.emit("ControlBarrier", None, self.uint(execution), self.uint(memory), self.uint(bits))

    # Control flow -----------------------------------------------------------------------------------------------

    def label(self, label: int) -> None:
        """Starts the block `label`."""
        self._body.append(("Label", None, label, ()))
        self.block = label
        self.terminated = False

    def goto(self, label: int) -> None:
        """Ends the block, unless it has ended already."""
        if not self.terminated:
            self.emit("Branch", None, label)

    def _enter(self) -> None:
        self._marks.append(len(self._trail))

    def _leave(self) -> None:
        mark = self._marks.pop()
        for key in self._trail[mark:]:
            del self._numbers[key]
        del self._trail[mark:]

    def branch(self, condition: int, then: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
        """An if with two sides; what they emit is visible only inside them."""
        yes, merge = self.new_id(), self.new_id()
        no = self.new_id() if otherwise else merge
        self.emit("SelectionMerge", None, merge, "None")
        self.emit("BranchConditional", None, condition, yes, no)
        reached = otherwise is None
        for label, side in ((yes, then), (no, otherwise)):
            if side is not None:
                self._enter()
                self.label(label)
                side()
                reached = reached or not self.terminated
                self.goto(merge)
                self._leave()
        self.label(merge)
        if not reached:
            self.emit("Unreachable", None)

    def select(
        self,
        condition: int,
        types: Sequence[int],
        then: Callable[[], Sequence[int]],
        otherwise: Callable[[], Sequence[int]],
    ) -> list[int]:
        """Values of `types` from the side that is taken; the other is not evaluated."""
        ends: list[tuple[Sequence[int], int]] = []

        def side(values: Callable[[], Sequence[int]]) -> Callable[[], None]:
            return lambda: ends.append((values(), self.block))

        self.branch(condition, side(then), side(otherwise))
        (left, left_block), (right, right_block) = ends
        return [
            a if a == b else self.emit("Phi", type_id, a, left_block, b, right_block)
            for type_id, a, b in zip(types, left, right, strict=True)
        ]

    def loop(
        self,
        initial: Sequence[int],
        condition: Callable[[Sequence[int]], int],
        body: Callable[[Sequence[int]], None],
        step: Callable[[Sequence[int]], Sequence[int]],
        control: str = "None",
        simple: bool = True,
    ) -> None:
        """while condition(v): body(v); v = step(v). `simple` says that the condition has no control flow of its own."""
        header, inside, proceed, merge = (self.new_id() for _ in range(4))
        before = self.block
        self.goto(header)
        self._enter()
        self.label(header)
        start = len(self._body)
        values = [self.emit("Phi", self.type_of[value]) for value in initial]
        if not simple:
            check = self.new_id()
            self.emit("LoopMerge", None, merge, proceed, control)
            self.emit("Branch", None, check)
            self.label(check)
        test = condition(values)
        if simple:
            self.emit("LoopMerge", None, merge, proceed, control)
        self.emit("BranchConditional", None, test, inside, merge)
        self._enter()
        self.label(inside)
        self._loops.append((proceed, merge))
        body(values)
        self._loops.pop()
        self.goto(proceed)
        self._leave()
        self.label(proceed)
        following = step(values)
        for offset, (first, value) in enumerate(zip(initial, following, strict=True)):
            name, type_id, result, _ = self._body[start + offset]
            self._body[start + offset] = (name, type_id, result, (first, before, value, self.block))
        self.goto(header)
        self._leave()
        self.label(merge)

    def break_(self) -> None:
        """Leaves the innermost loop."""
        self.goto(self._loops[-1][1])

    def continue_(self) -> None:
        """Continues with the next round of the innermost loop."""
        self.goto(self._loops[-1][0])

    @property
    def nested(self) -> bool:
        """Whether this place is inside a branch or a loop."""
        return bool(self._marks)

    @property
    def in_loop(self) -> bool:
        return bool(self._loops)

    # The module -------------------------------------------------------------------------------------------------

    def finish(self, workgroup_size: Sequence[int]) -> encoding.Module:
        """Ends the function and encodes the module."""
        if not self.terminated:
            self.emit("Return", None)
        void = self.void()
        function = self._type(Type("function"), "TypeFunction", void)
        code: list[Instr] = [
            ("Function", void, self._main, ("None", function)),
            ("Label", None, self._entry, ()),
            *self._locals,
            *self._body,
            ("FunctionEnd", None, None, ()),
        ]
        live = encoding.live_ids(code, self._globals, EFFECTS)
        keep = [row for row in code if encoding.is_live(row, live, EFFECTS)]
        globals_ = [row for row in self._globals if row[2] in live]
        interface = [row[2] for row in globals_ if row[0] == "Variable"]
        types = {key: info for key, info in self.types.items() if key in live}
        capabilities = encoding.capabilities(keep, types) | self._extra_capabilities
        model = "GLSL450"
        if self.vulkan_memory_model:
            model = "Vulkan"
            capabilities.add("VulkanMemoryModel")
        extensions = sorted(encoding.EXTENSIONS[name] for name in capabilities if name in encoding.EXTENSIONS)
        rows: list[Instr] = [
            *(("Capability", None, None, (name,)) for name in sorted(capabilities)),
            *(("Extension", None, None, (name,)) for name in dict.fromkeys(extensions)),
            ("ExtInstImport", None, self._glsl, ("GLSL.std.450",)),
            ("MemoryModel", None, None, ("PhysicalStorageBuffer64", model)),
            ("EntryPoint", None, None, ("GLCompute", self._main, "main", *interface)),  # type: ignore[arg-type]
            ("ExecutionMode", None, None, (self._main, "LocalSize", *workgroup_size)),
            *(row for row in self._names if row[3][0] in live),
            *(row for row in self._decorations if row[3][0] in live),
            *globals_,
            *keep,
        ]
        return encoding.Module(encoding.encode(rows, self._next), frozenset(capabilities))


def _representable(value: float, bits: int) -> float:
    """`value` rounded to what the width can hold: infinity beyond its range."""
    limit = {16: 65520.0, 32: 3.4028235677973366e38}.get(bits)
    if limit is not None and abs(value) >= limit and value == value:
        return float("inf") if value > 0 else float("-inf")
    return value
