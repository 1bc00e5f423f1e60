"""Schedule templates for NVIDIA GPUs with tensor cores: the choice of tiles for the kernels of `kernels.cuda`.

Their decisions are the fields of the tiles. Every other kernel has the template that it has on any GPU
(`tvm_attn.schedule.gpu`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TypeVar

from tvm import tirx

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.cuda import (
    Advance,
    DecodeAttention,
    LayerNorm,
    PrefillAttention,
    gemv,
    matmul_cost,
    norm,
    sampling,
)
from tvm_attn.kernels.cuda.decode_attention import decode_attention, decode_candidates, default_decode_tiles
from tvm_attn.kernels.cuda.linear import DTYPES
from tvm_attn.kernels.cuda.matmul import matmul
from tvm_attn.kernels.cuda.matmul_tiles import LinearKernel
from tvm_attn.kernels.cuda.prefill_attention import default_prefill_tiles, prefill_attention, prefill_candidates
from tvm_attn.schedule import gpu
from tvm_attn.schedule.base import Chooser, Template
from tvm_attn.storage import GROUP
from tvm_attn.targets import CudaTarget

Tiles = TypeVar("Tiles")


def _choose_tiles(choose: Chooser, default: Tiles, candidates: Iterable[Tiles]) -> Tiles:
    """One of the candidates, a decision for each field: one of the values that those have which agree so far."""
    left = [default, *(candidate for candidate in candidates if candidate != default)]
    for field in fields(default):  # type: ignore[arg-type]
        values = [int(getattr(tiles, field.name)) for tiles in left]
        chosen = choose(field.name, sorted(set(values)), values[0])
        left = [tiles for tiles, value in zip(left, values, strict=True) if value == chosen]
    return left[0]


def _linear(kernel: LinearKernel, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    multiple = 16 if kernel.weights in DTYPES else GROUP
    if kernel.in_features % multiple:
        raise ScheduleError(
            f"tensor cores take {kernel.weights} weights of a multiple of {multiple} inputs, not {kernel.in_features}; "
            "build with --dtype float32"
        )
    if kernel.groups == 1:
        tiles = _choose_tiles(choose, gemv.default_tiles(kernel), gemv.candidates(kernel))
        return gemv.gemv(kernel, tiles)
    default = matmul_cost.default_tiles(kernel, kernel.most_rows)
    return matmul(kernel, _choose_tiles(choose, default, matmul_cost.candidates(kernel, kernel.most_rows)))


def _layer_norm(kernel: LayerNorm, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    return norm.layer_norm(kernel, _choose_tiles(choose, norm.default_tiles(kernel), norm.candidates(kernel)))


def _check_head(kernel: PrefillAttention | DecodeAttention) -> None:
    if kernel.head_dim % 16 or not 32 <= kernel.head_dim <= 128:
        raise ScheduleError(
            f"tensor cores take heads of 32 to 128 dimensions, a multiple of 16, not {kernel.head_dim}; "
            "build with --dtype float32"
        )


def _prefill_attention(kernel: PrefillAttention, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    _check_head(kernel)
    tiles = _choose_tiles(choose, default_prefill_tiles(kernel), prefill_candidates(kernel))
    return prefill_attention(kernel, tiles)


def _decode_attention(kernel: DecodeAttention, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    _check_head(kernel)
    tiles = _choose_tiles(choose, default_decode_tiles(kernel), decode_candidates(kernel))
    return decode_attention(kernel, tiles)


def _advance(kernel: Advance, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    default = sampling.default_tiles(kernel)
    candidates = [replace(default, threads=threads) for threads in (128, 256, 512, 1024)]
    return sampling.advance(kernel, _choose_tiles(choose, default, candidates))


TEMPLATES: tuple[Template, ...] = (
    Template("cuda.linear", 1, ("cuda_linear", "cuda_residual_linear", "cuda_qkv_linear", "cuda_head"), _linear),
    Template("cuda.layer_norm", 1, ("cuda_layer_norm",), _layer_norm),
    Template("cuda.prefill_attention", 1, ("cuda_prefill_attention",), _prefill_attention),
    Template("cuda.decode_attention", 1, ("cuda_decode_attention",), _decode_attention),
    Template("cuda.advance", 1, ("cuda_advance",), _advance),
    *gpu.TEMPLATES,
)
"""The templates of this device class."""
