"""What the loops of FlashAttention on processors share: their sizes, and the step of the online softmax (Milakov and
Gimelshein, 2018, arXiv:1805.02867)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.attention import MASKED


@dataclass(frozen=True)
class PrefillTiles:
    """The tile sizes of the loops.

    Attributes:
        queries: queries of a tile, the vectorised dimension.
        key_block: keys between two updates of the running maximum.
        key_tile: keys whose scores are in registers at the same time, a divisor of `key_block`.
        dim_tile: output dimensions that are in registers at the same time, a divisor of D.
    """

    queries: int
    key_block: int
    key_tile: int
    dim_tile: int


def causal_mask(key_block: int, query_tile: int) -> Any:
    """A TVMScript macro (scores, first_key, first) that masks the scores (key_block, query_tile) of keys past a query's
    position. `first_key` and `first` are the positions of the first key and query; see `softmax_step`."""

    @T.inline
    def mask_scores(scores, first_key, first):
        if first_key + key_block - 1 > first:
            for j, i in T.grid(key_block, query_tile):
                with T.sblock("mask"):
                    vj, vi = T.axis.remap("SS", [j, i])
                    scores[vj, vi] = T.Select(first_key + vj <= first + vi, scores[vj, vi], T.float32(MASKED))

    return mask_scores


def softmax_step(key_block: int, query_tile: int) -> Any:
    """A TVMScript macro (scores, maximum, previous, total) that adds a block of keys to the softmax.

    Afterwards `scores` (key_block, query_tile) holds the exponentials of their distances to the new `maximum`, `total`
    their sum over all blocks, and `previous` the factor for sums over earlier blocks; the last three are (query_tile,).

    Every function needs its own macro: TVM renames the blocks of a macro that is used again.
    """

    @T.inline
    def update_softmax(scores, maximum, previous, total):
        for i in range(query_tile):
            with T.sblock("keep_maximum"):
                vi = T.axis.spatial(query_tile, i)
                previous[vi] = maximum[vi]
        for j, i in T.grid(key_block, query_tile):
            with T.sblock("maximum"):
                vj, vi = T.axis.remap("RS", [j, i])
                maximum[vi] = T.max(maximum[vi], scores[vj, vi])
        for i in range(query_tile):
            with T.sblock("correction"):
                vi = T.axis.spatial(query_tile, i)
                previous[vi] = exp(previous[vi] - maximum[vi])
        for i in range(query_tile):
            with T.sblock("rescale_sum"):
                vi = T.axis.spatial(query_tile, i)
                total[vi] = total[vi] * previous[vi]
        for j in range(key_block):
            for i in range(query_tile):
                with T.sblock("probabilities"):
                    vj, vi = T.axis.remap("SS", [j, i])
                    scores[vj, vi] = exp(scores[vj, vi] - maximum[vi])
            for i in range(query_tile):
                with T.sblock("sum"):
                    vj, vi = T.axis.remap("RS", [j, i])
                    total[vi] = total[vi] + scores[vj, vi]

    return update_softmax
