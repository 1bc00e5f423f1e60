"""Operations and bytes against counts made by other means."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from tvm_attn.benchmark.counts import Storage, Work, decode_work, kernel_work, prefill_work
from tvm_attn.benchmark.ours import CompiledSystem
from tvm_attn.benchmark.system import Case
from tvm_attn.config import PRESETS, GPT2Config, param_shapes

CONFIG = GPT2Config.from_dict(
    {"model_type": "gpt2", "vocab_size": 211, "n_positions": 64, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 80}
)
FLOAT32 = Storage("float32", "float32", "float32")


def counted_products(config: GPT2Config, tokens: int, batch: int, last_only: bool) -> int:
    """Operations that PyTorch counts in transformers' model, less attention, which it computes without its mask."""
    torch_config = transformers.GPT2Config(**config.to_dict(), attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(torch_config).eval()
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1 if last_only else 0)
    return counter.get_total_flops() - 4 * config.n_layer * batch * tokens * tokens * config.n_embd


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_products_of_a_prompt_are_what_pytorch_counts(tokens: int) -> None:
    """In the last layer, all tokens but the last one have keys and values and nothing else."""
    shorter = replace(CONFIG, n_layer=CONFIG.n_layer - 1)
    last_layer = counted_products(CONFIG, 1, 1, last_only=True) - counted_products(shorter, 1, 1, last_only=True)
    other_keys_and_values = (tokens - 1) * 2 * CONFIG.n_embd * 2 * CONFIG.n_embd
    expected = counted_products(shorter, tokens, 1, last_only=True) + last_layer + other_keys_and_values
    assert prefill_work(CONFIG, tokens, FLOAT32).products == expected


def test_a_token_of_124m_is_a_quarter_of_a_gigaflop() -> None:
    """Two operations for every parameter but the position table and the vectors: 124.4M - 0.8M - 0.1M."""
    work = decode_work(PRESETS["gpt2"], 1, 1, FLOAT32)
    assert work.products == 2 * (124_439_808 - 1024 * 768 - 121_344)


@pytest.mark.parametrize("batch", [1, 5])
def test_products_of_a_token_are_what_pytorch_counts(batch: int) -> None:
    assert decode_work(CONFIG, 17, batch, FLOAT32).products == counted_products(CONFIG, 1, batch, last_only=False)


def test_attention_is_causal() -> None:
    operations = 0
    for row in range(9):
        for _ in range(row + 1):
            operations += 2 * CONFIG.n_embd + 2 * CONFIG.n_embd  # a score and a weighted value, all heads
    last_row = 9 * 4 * CONFIG.n_embd  # the others look at nothing in the last layer
    assert prefill_work(CONFIG, 9, FLOAT32).attention == (CONFIG.n_layer - 1) * operations + last_row
    assert decode_work(CONFIG, 8, 1, FLOAT32).attention == CONFIG.n_layer * last_row


@pytest.mark.parametrize(
    ("storage", "weight_bits", "cache_bytes"),
    [
        (FLOAT32, 32, 4),
        (Storage("bfloat16_pairs", "bfloat16", "bfloat16"), 16, 2),
        (Storage("int4", "float32", "float32"), 4 + 0.5, 4),
    ],
)
def test_bytes_are_those_of_the_parameters_and_the_cache(
    storage: Storage, weight_bits: float, cache_bytes: int
) -> None:
    context, batch = 20, 3
    expected = 0.0
    for name, shape in param_shapes(CONFIG).items():
        if name == "wpe.weight":
            expected += batch * shape[1] * cache_bytes
        elif len(shape) == 1:
            expected += shape[0] * 4
        else:
            expected += math.prod(shape) * weight_bits / 8
    expected += batch * CONFIG.n_embd * weight_bits / 8  # rows of the token table
    cache = np.empty((batch, 2, CONFIG.n_head, context + 1, CONFIG.head_dim))
    expected += CONFIG.n_layer * cache.size * cache_bytes
    assert decode_work(CONFIG, context, batch, storage).bytes == round(expected)


@pytest.fixture(scope="module")
def system(demo_artifact) -> CompiledSystem:
    return CompiledSystem(demo_artifact, threads=2, max_batch=8)


@pytest.mark.parametrize("case", [Case("decode", 100), Case("decode", 3), Case("decode", 40, 8), Case("prefill", 43)])
def test_the_kernels_of_a_call_do_its_work(system: CompiledSystem, case: Case) -> None:
    if case.phase == "decode":
        system.fill(case)
    times = system.kernel_times(case, 0.0)
    works = [entry.work for entry in times]
    assert None not in works, "a kernel family is not counted"
    total = sum((work for work in works if work), Work(0, 0, 0))
    # Kernels also compute the rows that pad a group; attention does not.
    group = 1 if case == Case("decode", case.tokens) else system.library.rows
    rows = -(-case.tokens_per_call // group) * group
    config, storage = system.config, system.storage
    if case.phase == "decode":
        assert total.products == decode_work(config, case.tokens, rows, storage).products
        assert total.attention == decode_work(config, case.tokens, case.batch, storage).attention
    else:
        # The group with the last row is computed whole, its keys and values twice, and the queries of all rows.
        width, head = config.n_embd, 2 * config.n_embd * config.vocab_size
        layer = 2 * (4 * width * width + 2 * width * config.n_inner)
        more = (group - 1) * (layer + head) + 2 * width * 2 * width + rows * 2 * width * width
        assert total.products == prefill_work(config, rows, storage).products + more
        assert total.attention == prefill_work(config, case.tokens, storage).attention
    assert all(entry.seconds > 0 and entry.calls > 0 for entry in times)


def test_every_kernel_that_a_call_can_reach_is_counted(demo_artifact) -> None:
    manifest = json.loads((demo_artifact / "manifest.json").read_text())
    (library,) = manifest["libraries"]
    for name, kernel in library["kernels"].items():
        packs_weights = kernel["family"] in ("pack_plain", "pack_words")
        work = kernel_work(kernel, 8, [(8, 0)], FLOAT32)
        assert (work is None) == packs_weights, name


def test_a_family_of_another_version_has_no_work() -> None:
    assert kernel_work({"family": "rotary"}, 8, [], FLOAT32) is None
