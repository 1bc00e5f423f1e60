"""SPIR-V to the standard assembly syntax, for the instructions that `spirv` lists."""

from __future__ import annotations

import struct

from tvm_attn.errors import CompileError
from tvm_attn.vulkan.codegen.spirv import BUILTIN, BY_NUMBER, ENUMERANTS, GLSL_BY_NUMBER, MAGIC, Instruction

_HEADER_WORDS = 5
_WIDTH = 15


def disassemble(code: bytes) -> str:
    """The assembly text of a module. Raises CompileError if the bytes are not SPIR-V that this package emits."""
    if len(code) % 4 or len(code) < 4 * _HEADER_WORDS or struct.unpack_from("<I", code)[0] != MAGIC:
        raise CompileError("not a SPIR-V module: its size or its first word is wrong")
    words = struct.unpack(f"<{len(code) // 4}I", code)
    lines = [
        "; SPIR-V",
        f"; Version: {words[1] >> 16 & 0xFF}.{words[1] >> 8 & 0xFF}",
        f"; Generator: {words[2]:#x}",
        f"; Bound: {words[3]}",
        f"; Schema: {words[4]}",
    ]
    types: dict[int, tuple[str, int]] = {}
    position = _HEADER_WORDS
    while position < len(words):
        length, number = words[position] >> 16, words[position] & 0xFFFF
        row = BY_NUMBER.get(number)
        if row is None or length == 0 or position + length > len(words):
            raise CompileError(
                f"word {position} of the SPIR-V module is no instruction of this package: {words[position]:#x}"
            )
        lines.append(_line(row, words[position + 1 : position + length], types))
        position += length
    return "\n".join(lines) + "\n"


def _line(row: Instruction, words: tuple[int, ...], types: dict[int, tuple[str, int]]) -> str:
    index, result, fields = 0, "", [f"Op{row.name}"]
    type_id = 0
    if row.has_type:
        type_id = words[index]
        fields.append(f"%{type_id}")
        index += 1
    if row.has_result:
        result = f"%{words[index]}"
        if row.name in ("TypeInt", "TypeFloat"):
            types[words[index]] = (row.name[4:], words[index + 1])
        index += 1
    fields += _operands(row, words[index:], types.get(type_id))
    left = f"{result} =".rjust(_WIDTH) if result else " " * _WIDTH
    return f"{left} {' '.join(fields)}"


def _operands(row: Instruction, words: tuple[int, ...], type_: tuple[str, int] | None) -> list[str]:
    kinds = row.operands
    fields: list[str] = []
    index = place = 0
    while index < len(words):
        repeated = place >= len(kinds) or kinds[place] == "*"
        kind = (kinds[-2] if kinds.endswith("*") else "n") if repeated else kinds[place]
        if kind == "s":
            text = struct.pack(f"<{len(words) - index}I", *words[index:]).split(b"\0")[0].decode()
            fields.append('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
            index += len(text.encode()) // 4 + 1
        elif kind == "v":
            fields.append(_number(words[index:], type_))
            index = len(words)
        else:
            fields.append(_operand(kind, words[index], fields))
            index += 1
        place += 1
    return fields


def _operand(kind: str, word: int, before: list[str]) -> str:
    if kind == "i":
        return f"%{word}"
    if kind == "E":
        return GLSL_BY_NUMBER.get(word, str(word))
    if kind == "n":
        builtins = {number: name for name, number in BUILTIN.items()}
        return builtins.get(word, str(word)) if before[-1:] == ["BuiltIn"] else str(word)
    names, mask = ENUMERANTS[kind]
    if mask and word:
        return "|".join(name for name, bit in names.items() if bit and word & bit)
    return {number: name for name, number in names.items()}.get(word, str(word))


def _number(words: tuple[int, ...], type_: tuple[str, int] | None) -> str:
    kind, bits = type_ or ("Int", 32)
    raw = sum(word << (32 * index) for index, word in enumerate(words))
    if kind == "Int":
        return str(raw)
    if bits == 16:
        raw &= 0xFFFF
    value = struct.unpack({16: "<e", 32: "<f", 64: "<d"}[bits], raw.to_bytes(bits // 8, "little"))[0]
    if value != value or value in (float("inf"), float("-inf")):
        return _special(raw, bits)
    return f"{value:.17g}" if bits == 64 else f"{value:.9g}"


def _special(raw: int, bits: int) -> str:
    """Infinity and NaN in hexadecimal, as the assembler reads them."""
    fraction = {16: 10, 32: 23, 64: 52}[bits]
    sign = "-" if raw >> (bits - 1) else ""
    exponent = {16: 16, 32: 128, 64: 1024}[bits]
    digits = raw & ((1 << fraction) - 1)
    width = -(-fraction // 4)
    shifted = digits << (4 * width - fraction)
    return f"{sign}0x1{f'.{shifted:0{width}x}' if digits else ''}p+{exponent}"
