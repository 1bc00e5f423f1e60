"""From a list of instructions to SPIR-V words: what is read, which capabilities follow, the binary form."""

from __future__ import annotations

import array
import struct
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from tvm_attn.vulkan.codegen.spirv import ENUMERANTS, GLSL_STD_450, INSTRUCTIONS, MAGIC, VERSION_1_6

# Name, result type, result, operands: ids and numbers as they are, enumerants and strings by name.
Instr = tuple[str, int | None, int | None, tuple[int | str, ...]]

EXTENSIONS = {
    "AtomicFloat32AddEXT": "SPV_EXT_shader_atomic_float_add",
    "AtomicFloat64AddEXT": "SPV_EXT_shader_atomic_float_add",
    "CooperativeMatrixKHR": "SPV_KHR_cooperative_matrix",
}
_STORAGE = {
    "Int8": "StorageBuffer8BitAccess",
    "Int16": "StorageBuffer16BitAccess",
    "Float16": "StorageBuffer16BitAccess",
}
_BY_INSTRUCTION = {
    "GroupNonUniformElect": "GroupNonUniform",
    "GroupNonUniformBroadcastFirst": "GroupNonUniformBallot",
    "GroupNonUniformBallot": "GroupNonUniformBallot",
    "GroupNonUniformShuffle": "GroupNonUniformShuffle",
    "GroupNonUniformShuffleXor": "GroupNonUniformShuffle",
    "GroupNonUniformShuffleUp": "GroupNonUniformShuffleRelative",
    "GroupNonUniformShuffleDown": "GroupNonUniformShuffleRelative",
}


class Type(NamedTuple):
    """What is known about a type: kind ("bool", "int", "float", "vector", "pointer", ...), width or count, parts."""

    kind: str
    size: int = 0
    element: int = 0
    storage: str = ""


class Module(NamedTuple):
    """An encoded module and the capabilities that it declares."""

    binary: bytes
    capabilities: frozenset[str]


def _ids(row: Instr) -> Iterable[int]:
    """The ids that an instruction reads."""
    name, type_id, _, operands = row
    if type_id is not None:
        yield type_id
    kinds = INSTRUCTIONS[name].operands
    repeat = kinds[-2] if kinds.endswith("*") else "n"
    for index, operand in enumerate(operands):
        kind = kinds[index] if index < len(kinds) and kinds[index] != "*" else repeat
        if kind == "i" and isinstance(operand, int):
            yield operand


def live_ids(code: Sequence[Instr], globals_: Sequence[Instr], effects: Collection[str]) -> set[int]:
    """The ids that instructions with an effect need, directly or not. A variable that is only written is not needed."""
    defined = {row[2]: row for row in (*globals_, *code) if row[2] is not None}
    written_only = _written_only(code)
    live: set[int] = set()
    work: list[int] = []
    for row in code:
        if row[0] in effects or row[0] in ("Function", "FunctionEnd"):
            if row[0] == "Store" and row[3][0] in written_only:
                continue
            work.extend(_ids(row))
            if row[2] is not None:
                work.append(row[2])
    while work:
        value = work.pop()
        if value not in live:
            live.add(value)
            row_ = defined.get(value)
            if row_ is not None:
                work.extend(_ids(row_))
    return live


def _written_only(code: Sequence[Instr]) -> set[int | str]:
    """Pointers into function variables that no instruction loads from."""
    base: dict[int | str, int | str] = {row[2]: row[2] for row in code if row[0] == "Variable" and row[2] is not None}
    read: set[int | str] = set()
    for name, _, result, operands in code:
        if name == "AccessChain" and result is not None and operands[0] in base:
            base[result] = base[operands[0]]
        elif name != "Variable":
            used = operands[1:] if name == "Store" else operands
            read.update(base[operand] for operand in used if operand in base)
    return {pointer for pointer, variable in base.items() if variable not in read}


def is_live(row: Instr, live: Collection[int], effects: Collection[str]) -> bool:
    """Whether an instruction of the function is kept."""
    name, _, result, operands = row
    if name == "Store":
        return operands[0] in live
    return result is None or name in effects or result in live


def capabilities(code: Sequence[Instr], types: Mapping[int, Type]) -> set[str]:
    """The capabilities that the instructions and types of a module need."""
    needed = {"Shader", "PhysicalStorageBufferAddresses"}
    small: dict[int, str] = {}
    for key, info in types.items():
        scalar = types.get(info.element, info) if info.kind in ("vector", "matrix") else info
        if info.kind == "matrix":
            needed.add("CooperativeMatrixKHR")
        if scalar.kind in ("int", "float") and scalar.size != 32:
            name = f"{scalar.kind.capitalize()}{scalar.size}"
            needed.add(name)
            if scalar.size < 32:
                small[key] = name
    for info in types.values():
        if info.kind == "pointer" and info.storage == "PhysicalStorageBuffer" and info.element in small:
            needed.add(_STORAGE[small[info.element]])
    for name, type_id, _, _ in code:
        if name in _BY_INSTRUCTION:
            needed.update(("GroupNonUniform", _BY_INSTRUCTION[name]))
        elif name.startswith("GroupNonUniform"):
            needed.update(("GroupNonUniform", "GroupNonUniformArithmetic"))
        elif name == "AtomicFAddEXT" and type_id is not None:
            needed.add(f"AtomicFloat{types[type_id].size}AddEXT")
        elif name.startswith("Atomic") and type_id is not None and types[type_id].size == 64:
            needed.add("Int64Atomics")
    return needed


def encode(rows: Sequence[Instr], bound: int) -> bytes:
    """The module as little-endian words; `bound` is above every id."""
    words = array.array("I", [MAGIC, VERSION_1_6, 0, bound, 0])
    for name, type_id, result, operands in rows:
        row = INSTRUCTIONS[name]
        start = len(words)
        words.append(0)
        if row.has_type:
            words.append(type_id or 0)
        if row.has_result:
            words.append(result or 0)
        for index, operand in enumerate(operands):
            if isinstance(operand, int):
                words.append(operand)
            else:
                words.extend(_text(row.operands[min(index, len(row.operands) - 1)], operand))
        words[start] = (len(words) - start) << 16 | row.number
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _text(kind: str, operand: str) -> Sequence[int]:
    """An operand given by name: a string, an enumerant, a set of flags joined by `|`."""
    if kind == "s":
        raw = operand.encode() + b"\0"
        raw += b"\0" * (-len(raw) % 4)
        return struct.unpack(f"<{len(raw) // 4}I", raw)
    if kind == "E":
        return (GLSL_STD_450[operand],)
    names, mask = ENUMERANTS[kind]
    return (sum(names[name] for name in operand.split("|")) if mask else names[operand],)
