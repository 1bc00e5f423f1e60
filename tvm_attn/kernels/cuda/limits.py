"""The limits of every supported NVIDIA GPU (sm_80 and later)."""

REGISTERS = 65536
"""32-bit registers per multiprocessor."""

SHARED_BYTES = 99 << 10
"""Bytes of shared memory that a block may have: sm_86, sm_89 and sm_120 have the least."""

UNIT_ELEMENTS = 8
"""16-bit numbers in 16 bytes: what a thread copies at a time, and a row of an `ldmatrix` matrix."""

HOPPER_SHARED_BYTES = 227 << 10
"""Bytes of shared memory that a block may have on sm_90."""
