"""SPIR-V as tables: the instructions, enumerants and extended instructions that the code generator uses.

Numbers are those of the Khronos SPIR-V 1.6 specification and of SPV_KHR_cooperative_matrix. Each instruction is written
`Name number operands`. An operand is one letter, and `*` after a letter repeats it; a leading `t` is the result type
and `r` the result:

    i  id                n  literal number          s  literal string       v  literal of the result type's width
    C  Capability        S  StorageClass            D  Decoration with its parameters
    A  AddressingModel   O  MemoryModel             X  ExecutionModel       x  ExecutionMode with its parameters
    M  MemoryAccess with its parameters             L  LoopControl          B  SelectionControl
    F  FunctionControl   G  GroupOperation          E  GLSL.std.450 instruction
    Q  CooperativeMatrixOperands
"""

from __future__ import annotations

from typing import NamedTuple

MAGIC = 0x07230203
VERSION_1_6 = 0x00010600

_INSTRUCTIONS = """
Undef 1 tr | Name 5 is | Extension 10 s | ExtInstImport 11 rs | ExtInst 12 triEi* | MemoryModel 14 AO
EntryPoint 15 Xisi* | ExecutionMode 16 ix | Capability 17 C | TypeVoid 19 r | TypeBool 20 r | TypeInt 21 rnn
TypeFloat 22 rn | TypeVector 23 rin | TypeArray 28 rii | TypeRuntimeArray 29 ri | TypeStruct 30 ri*
TypePointer 32 rSi | TypeFunction 33 rii* | ConstantTrue 41 tr | ConstantFalse 42 tr | Constant 43 trv
ConstantComposite 44 tri* | ConstantNull 46 tr | SpecConstantFalse 49 tr | SpecConstant 50 trv
SpecConstantOp 52 trni* | Function 54 trFi | FunctionEnd 56 | Variable 59 trSi* | Load 61 triM | Store 62 iiM
AccessChain 65 trii* | Decorate 71 iD | MemberDecorate 72 inD | VectorExtractDynamic 77 trii
VectorInsertDynamic 78 triii | VectorShuffle 79 triin* | CompositeConstruct 80 tri* | CompositeExtract 81 trin*
CompositeInsert 82 triin* | CopyObject 83 tri | ConvertFToU 109 tri | ConvertFToS 110 tri | ConvertSToF 111 tri
ConvertUToF 112 tri | UConvert 113 tri | SConvert 114 tri | FConvert 115 tri | ConvertPtrToU 117 tri
ConvertUToPtr 120 tri | Bitcast 124 tri | SNegate 126 tri | FNegate 127 tri | IAdd 128 trii | FAdd 129 trii
ISub 130 trii | FSub 131 trii | IMul 132 trii | FMul 133 trii | UDiv 134 trii | SDiv 135 trii | FDiv 136 trii
UMod 137 trii | UMulExtended 151 trii | SMulExtended 152 trii | Any 154 tri | All 155 tri
LogicalEqual 164 trii | LogicalNotEqual 165 trii | LogicalOr 166 trii | LogicalAnd 167 trii | LogicalNot 168 tri
Select 169 triii | IEqual 170 trii | INotEqual 171 trii | UGreaterThan 172 trii | SGreaterThan 173 trii
UGreaterThanEqual 174 trii | SGreaterThanEqual 175 trii | ULessThan 176 trii | SLessThan 177 trii
ULessThanEqual 178 trii | SLessThanEqual 179 trii | FOrdEqual 180 trii | FUnordNotEqual 183 trii
FOrdLessThan 184 trii | FOrdGreaterThan 186 trii | FOrdLessThanEqual 188 trii | FOrdGreaterThanEqual 190 trii
ShiftRightLogical 194 trii | ShiftRightArithmetic 195 trii | ShiftLeftLogical 196 trii | BitwiseOr 197 trii
BitwiseXor 198 trii | BitwiseAnd 199 trii | Not 200 tri | BitCount 205 tri | ControlBarrier 224 iii
MemoryBarrier 225 ii | AtomicLoad 227 triii | AtomicStore 228 iiii | AtomicExchange 229 triiii
AtomicCompareExchange 230 triiiiii | AtomicIAdd 234 triiii | AtomicSMin 236 triiii | AtomicUMin 237 triiii
AtomicSMax 238 triiii | AtomicUMax 239 triiii | AtomicAnd 240 triiii | AtomicOr 241 triiii
AtomicXor 242 triiii | Phi 245 tri* | LoopMerge 246 iiL | SelectionMerge 247 iB | Label 248 r | Branch 249 i
BranchConditional 250 iii | Return 253 | Unreachable 255 | GroupNonUniformElect 333 tri
GroupNonUniformBroadcastFirst 338 trii | GroupNonUniformBallot 339 trii | GroupNonUniformShuffle 345 triii
GroupNonUniformShuffleXor 346 triii | GroupNonUniformShuffleUp 347 triii | GroupNonUniformShuffleDown 348 triii
GroupNonUniformIAdd 349 triGi | GroupNonUniformFAdd 350 triGi | GroupNonUniformSMin 353 triGi
GroupNonUniformUMin 354 triGi | GroupNonUniformFMin 355 triGi | GroupNonUniformSMax 356 triGi
GroupNonUniformUMax 357 triGi | GroupNonUniformFMax 358 triGi | TypeCooperativeMatrixKHR 4456 riiiii
CooperativeMatrixLoadKHR 4457 triiiM | CooperativeMatrixStoreKHR 4458 iiiiM
CooperativeMatrixMulAddKHR 4459 triiiQ | CooperativeMatrixLengthKHR 4460 tri | AtomicFAddEXT 6035 triiii
"""


class Instruction(NamedTuple):
    """One row of the table: number, operand letters (without type and result), and which of these two it has."""

    name: str
    number: int
    has_type: bool
    has_result: bool
    operands: str


def _parse(table: str) -> dict[str, Instruction]:
    rows: dict[str, Instruction] = {}
    for row in table.replace("\n", "|").split("|"):
        fields = row.split()
        if fields:
            kinds = fields[2] if len(fields) > 2 else ""
            has_type, has_result = kinds.startswith("t"), kinds.startswith(("r", "tr"))
            rows[fields[0]] = Instruction(fields[0], int(fields[1]), has_type, has_result, kinds.lstrip("tr"))
    return rows


INSTRUCTIONS = _parse(_INSTRUCTIONS)
BY_NUMBER = {row.number: row for row in INSTRUCTIONS.values()}

# Instructions that must stay even if nothing reads their result.
EFFECTS = frozenset(
    name
    for name in INSTRUCTIONS
    if name.startswith(("Atomic", "Branch", "Return"))
    or name in ("Store", "ControlBarrier", "MemoryBarrier", "LoopMerge", "SelectionMerge", "Label", "Unreachable")
    or name == "CooperativeMatrixStoreKHR"
)
TERMINATORS = frozenset(("Branch", "BranchConditional", "Return", "Unreachable"))

CAPABILITY = {
    "Shader": 1,
    "Float16": 9,
    "Float64": 10,
    "Int64": 11,
    "Int64Atomics": 12,
    "Int16": 22,
    "Int8": 39,
    "GroupNonUniform": 61,
    "GroupNonUniformArithmetic": 63,
    "GroupNonUniformBallot": 64,
    "GroupNonUniformShuffle": 65,
    "GroupNonUniformShuffleRelative": 66,
    "StorageBuffer16BitAccess": 4433,
    "StorageBuffer8BitAccess": 4448,
    "VulkanMemoryModel": 5345,
    "PhysicalStorageBufferAddresses": 5347,
    "CooperativeMatrixKHR": 6022,
    "AtomicFloat32AddEXT": 6033,
    "AtomicFloat64AddEXT": 6034,
}
STORAGE_CLASS = {"Input": 1, "Workgroup": 4, "Function": 7, "PushConstant": 9, "PhysicalStorageBuffer": 5349}
DECORATION = {
    "SpecId": 1,
    "Block": 2,
    "ArrayStride": 6,
    "BuiltIn": 11,
    "Aliased": 20,
    "NonWritable": 24,
    "Offset": 35,
    "NoContraction": 42,
    "RestrictPointer": 5355,
    "AliasedPointer": 5356,
}
BUILTIN = {
    "NumWorkgroups": 24,
    "WorkgroupId": 26,
    "LocalInvocationId": 27,
    "SubgroupSize": 36,
    "SubgroupLocalInvocationId": 41,
}
MEMORY_ACCESS = {
    "None": 0,
    "Volatile": 1,
    "Aligned": 2,
    "MakePointerAvailable": 8,
    "MakePointerVisible": 16,
    "NonPrivatePointer": 32,
}
SCOPE = {"Device": 1, "Workgroup": 2, "Subgroup": 3}
SEMANTICS = {
    "None": 0,
    "AcquireRelease": 0x8,
    "UniformMemory": 0x40,
    "WorkgroupMemory": 0x100,
    "MakeAvailable": 0x2000,
    "MakeVisible": 0x4000,
}

# Operand letter -> (enumerants, whether it is a bit mask).
ENUMERANTS: dict[str, tuple[dict[str, int], bool]] = {
    "C": (CAPABILITY, False),
    "S": (STORAGE_CLASS, False),
    "D": (DECORATION, False),
    "A": ({"PhysicalStorageBuffer64": 5348}, False),
    "O": ({"GLSL450": 1, "Vulkan": 3}, False),
    "X": ({"GLCompute": 5}, False),
    "x": ({"LocalSize": 17}, False),
    "M": (MEMORY_ACCESS, True),
    "L": ({"None": 0, "Unroll": 1, "DontUnroll": 2}, True),
    "B": ({"None": 0, "Flatten": 1, "DontFlatten": 2}, True),
    "F": ({"None": 0}, True),
    "G": ({"Reduce": 0, "InclusiveScan": 1, "ExclusiveScan": 2}, False),
    "Q": ({"None": 0}, True),
}

GLSL_STD_450 = {
    "Round": 1,
    "RoundEven": 2,
    "Trunc": 3,
    "FAbs": 4,
    "SAbs": 5,
    "FSign": 6,
    "SSign": 7,
    "Floor": 8,
    "Ceil": 9,
    "Fract": 10,
    "Radians": 11,
    "Degrees": 12,
    "Sin": 13,
    "Cos": 14,
    "Tan": 15,
    "Asin": 16,
    "Acos": 17,
    "Atan": 18,
    "Sinh": 19,
    "Cosh": 20,
    "Tanh": 21,
    "Asinh": 22,
    "Acosh": 23,
    "Atanh": 24,
    "Atan2": 25,
    "Pow": 26,
    "Exp": 27,
    "Log": 28,
    "Exp2": 29,
    "Log2": 30,
    "Sqrt": 31,
    "InverseSqrt": 32,
    "FMin": 37,
    "UMin": 38,
    "SMin": 39,
    "FMax": 40,
    "UMax": 41,
    "SMax": 42,
    "FClamp": 43,
    "UClamp": 44,
    "SClamp": 45,
    "FMix": 46,
    "Fma": 50,
    "Ldexp": 53,
    "FindILsb": 73,
    "FindSMsb": 74,
    "FindUMsb": 75,
    "NMin": 79,
    "NMax": 80,
    "NClamp": 81,
}
GLSL_BY_NUMBER = {number: name for name, number in GLSL_STD_450.items()}
