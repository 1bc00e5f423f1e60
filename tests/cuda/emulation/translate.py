"""Rewrites CUDA source that TVM generated into C++ for `include/cuda_emulation.h`.

A C++ compiler for this machine cannot assemble PTX: every `asm` statement becomes a block of calls, one for each
instruction, of the functions `ptx_*` in `include/ptx*.h`.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

INCLUDE = Path(__file__).parent / "include"

_ASM = re.compile(r"\b(?:asm|__asm__)(?:\s+(?:volatile|__volatile__))?\s*\(")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')
_DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:(?:alignas|__align__)\s*\(\d+\)\s*)?(\w[\w ]*?)\s+(\w+)\s*\[\s*\]\s*;"
)
_REGISTER_TYPES = {
    "pred": "bool", "b16": "uint16_t", "u16": "uint16_t", "s16": "int16_t", "b32": "uint32_t", "u32": "uint32_t",
    "s32": "int32_t", "f32": "float", "b64": "uint64_t", "u64": "uint64_t", "s64": "int64_t", "f64": "double",
}  # fmt: skip
# The C++ type of an operand by its constraint: a register has a size and no sign.
_CONSTRAINTS = {"r": "uint32_t", "h": "uint16_t", "f": "float", "d": "double"}
_SPECIAL_REGISTERS = {
    "%%laneid": "emulation::current->lane",
    **{f"%%{name}.{axis}": f"{struct}.{axis}" for axis in "xyz" for name, struct in (
        ("tid", "threadIdx"), ("ntid", "blockDim"), ("ctaid", "blockIdx"), ("nctaid", "gridDim"))},
}  # fmt: skip
# A loop that polls an mbarrier, which becomes one instruction of ours.
_POLL = re.compile(
    r"(\w+):\s*mbarrier\.try_wait\.parity[\w.:]*\s+(%*\w+),\s*(\[[^\]]*\]),\s*(%*\w+)(?:,\s*%*\w+)?;\s*"
    r"@\2\s+bra\.uni\s+(\w+);\s*bra\.uni\s+\1;\s*\5:"
)
# Modifiers of loads and stores that change nothing here, because one thread runs at a time.
_MARKS = r"(?:\.(?:weak|relaxed|acquire|release|volatile|nc|cta|gpu|sys|ca|cg|cs|cv|lu|wb|wt|L1::\w+|L2::\w+))*"
_LOAD_STORE = re.compile(rf"(ld|st){_MARKS}(?:\.(global|shared(?:::cta)?))?{_MARKS}(?:\.v[248])?\.([bsuf]\d+)")


class EmulationError(Exception):
    """A kernel does something that a device would not do; the message says what, and where."""


def translate(source: str) -> str:
    """C++ that defines `emulated_NAME(void* const* arguments)` for every kernel of the CUDA source.

    Raises:
        EmulationError: the source has PTX that is not emulated.
    """
    kernels = list(dict.fromkeys(_KERNEL.findall(source)))
    source = _DYNAMIC_SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(emulation::DynamicShared());", source)
    # GCC does not accept `alignas` after `static`.
    source = re.sub(r"\balignas\((\d+)\)", r"__attribute__((aligned(\1)))", source)
    pieces, end = [], 0
    for match in _ASM.finditer(source):
        close = _closing(source, match.end() - 1)
        pieces += [source[end : match.start()], _translate_asm(source[match.end() : close])]
        end = close + 1
    body = "".join(pieces) + source[end:]
    exports = "".join(f"EMULATED_KERNEL({name})\n" for name in kernels)
    return f'#include "cuda_emulation.h"\n{body}\n{exports}EMULATED_LIBRARY\n'


def _closing(text: str, start: int) -> int:
    """The position at which the bracket opened at `start` closes. Brackets in string literals do not count."""
    depth, i = 0, start
    while i < len(text):
        if text[i] == '"':
            i = _end_of_string(text, i)
        elif text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise EmulationError(f"an unclosed bracket in the source: {text[start : start + 60]!r}")


def _end_of_string(text: str, start: int) -> int:
    i = start + 1
    while text[i] != '"':
        i += 2 if text[i] == "\\" else 1
    return i


def _split(text: str, separator: str) -> list[str]:
    """Parts between the separators that are outside brackets and string literals."""
    parts, start, i = [], 0, 0
    while i < len(text):
        if text[i] == '"':
            i = _end_of_string(text, i)
        elif text[i] in "([{":
            i = _closing(text, i)
        elif text[i] == separator:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    return [*parts, text[start:]]


def _translate_asm(text: str) -> str:
    """The C++ for the text between the brackets of an asm statement."""
    template, *sections = _split(text, ":")
    assembly = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', template)).replace("\\n", "\n").replace("\\t", " ")
    assembly = _POLL.sub(r"mbarrier.wait.parity \3, \4;", assembly)
    scope = dict(_SPECIAL_REGISTERS)  # the text of an operand -> C++
    number = 0
    for section in sections[:2]:
        for operand in filter(str.strip, _split(section, ",")):
            match = re.fullmatch(r'\s*"([=+]?)(\w)"\s*\((.*)\)\s*', operand, re.DOTALL)
            if match is None:
                raise EmulationError(f"an asm operand that is not understood: {operand.strip()}")
            output, constraint, expression = match.groups()
            cast, type_ = ("reinterpret_cast", "{}&") if output else ("static_cast", "{}")
            type_ = type_.format(_CONSTRAINTS.get(constraint, ""))
            scope[f"%{number}"] = f"{cast}<{type_}>({expression})" if constraint in _CONSTRAINTS else f"({expression})"
            number += 1
    return f"do {{ {_translate_instructions(assembly, scope)} }} while (0)"


def _translate_instructions(assembly: str, scope: dict[str, str]) -> str:
    statements = []
    for statement in filter(None, map(str.strip, _split(re.sub(r"//[^\n]*", "", assembly), ";"))):
        if statement.startswith("{"):
            end = _closing(statement, 0)
            statements.append(f"{{ {_translate_instructions(statement[1:end], scope)} }}")
            rest = statement[end + 1 :].strip()  # a block needs no semicolon
            if rest:
                statements.append(_translate_instructions(rest, scope))
        elif register := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", statement):
            if register[1] not in _REGISTER_TYPES:
                raise EmulationError(f"PTX registers of type .{register[1]} are not emulated: {statement}")
            names = [name.strip() for name in register[2].split(",")]
            scope |= {name: name.lstrip("%") for name in names}
            statements.append(f"{_REGISTER_TYPES[register[1]]} {', '.join(scope[name] for name in names)};")
        else:
            guard = re.match(r"@(!?)(%*\w+)\s+", statement)
            call = _translate_instruction(statement[guard.end() :] if guard else statement, scope)
            statements.append(f"if ({guard[1]}{_operand(guard[2], scope)}) {call};" if guard else f"{call};")
    return " ".join(statements)


def _translate_instruction(instruction: str, scope: dict[str, str]) -> str:
    mnemonic, _, rest = instruction.partition(" ")
    operands: list[str] = []
    for group in filter(None, map(str.strip, _split(rest, ","))):
        operands += _split(group[1:-1], ",") if group.startswith("{") else [group]
    operands = [operand for operand in operands if operand != "_"]  # a result that nobody wants
    if match := _LOAD_STORE.fullmatch(mnemonic):
        type_ = {"b8": "uint8_t", "u8": "uint8_t", "s8": "int8_t"}.get(match[3]) or _REGISTER_TYPES.get(match[3])
        if type_ is None:
            raise EmulationError(f"PTX instruction {mnemonic} is not emulated")
        # A load has its registers first, the function has the address first.
        name = f"emulation::{'Load' if match[1] == 'ld' else 'Store'}<{type_}>"
        operands = [operands[-1], *operands[:-1]] if match[1] == "ld" else operands
    else:
        name = "ptx_" + re.sub(r"\.L[12]::\w+", "", mnemonic).replace("::", "_").replace(".", "_")
        if name.removeprefix("ptx_") not in _emulated():
            raise EmulationError(f"PTX instruction {mnemonic} is not emulated")
    return f"{name}({', '.join(_operand(operand.strip(), scope) for operand in operands)})"


def _operand(text: str, scope: dict[str, str]) -> str:
    if text in scope:
        return scope[text]
    if match := re.fullmatch(r"\[\s*([%\w]+)\s*(?:([+-])\s*(\w+)\s*)?\]", text):
        base = _operand(match[1], scope)
        return f"emulation::Offset({base}, {match[2]}{match[3]})" if match[2] else base
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return f"emulation::Bits<float>(0x{match[1]}u)"
    if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", text):
        return text
    raise EmulationError(f"PTX operand {text!r} is not emulated")


@functools.cache
def _emulated() -> frozenset[str]:
    """The instructions that the headers define, as their functions' names without `ptx_`."""
    names: set[str] = set()
    for header in INCLUDE.glob("ptx*.h"):
        text = header.read_text()
        names.update(re.findall(r"\bptx_(\w+)(?=\()", text))
        # If a macro makes several names: ptx_a_##SUFFIX(...) and each use of the macro.
        for macro, parameter, body in re.findall(r"#define (EMULATED_\w+)\((\w+)[^)]*\)((?:.*\\\n)+.*)", text):
            values = re.findall(rf"^{macro}\((\w+)", text, re.MULTILINE)
            for stem, tail in re.findall(rf"ptx_(\w+?)##{parameter}(?:##(\w+))?\(", body):
                names.update(f"{stem}{value}{tail}" for value in values)
    return frozenset(names)
