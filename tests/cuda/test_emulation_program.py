"""A whole artifact on the emulated device: the compiler's host code, the virtual machine, CUDA graphs, the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.cuda.emulation import device
from tvm_attn.compiler.build import build
from tvm_attn.kernels import Advance, DecodeAttention
from tvm_attn.kernels.cuda import decode_attention, sampling
from tvm_attn.kernels.cuda.decode_attention import DecodeTiles
from tvm_attn.kernels.cuda.sampling import AdvanceTiles

# It installs the device permanently, so it runs in its own process.
CHECK = """
import sys
from tests.cuda.emulation import device
device.install()
import tvm_attn
from tvm_attn.compiler.verification import verify_artifact

verify_artifact(sys.argv[1], "cuda:0").raise_if_failed("the emulated library")
prompts, options = [[1, 2, 3], [7] * 20, [5]], {"max_new_tokens": 8, "stop_token_ids": ()}
tokens = {}
for graph in (True, False):
    model = tvm_attn.load(sys.argv[1], "cuda:0", graph=graph, max_batch=9)
    assert model.engine.graph == graph
    tokens[graph] = [model.generate(ids, **options) for ids in (prompts[0], prompts, prompts * 3)]
assert tokens[True] == tokens[False]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with random weights for every parameter."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=200, n_positions=40, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quant"), [("float16", "none")])
def test_artifact(checkpoint: Path, dtype: str, quant: str, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"

    def tiles(kernel: DecodeAttention) -> DecodeTiles:
        """Blocks that split keys and merge, in this context too."""
        return DecodeTiles(2) if kernel.groups is None else DecodeTiles(2, 3, alone=4)

    def split(kernel: Advance) -> AdvanceTiles:
        return AdvanceTiles(32, 2) if kernel.groups is None else AdvanceTiles(32, 2, 4)

    with (
        device.source_in_libraries(),
        mock.patch.object(decode_attention, "default_decode_tiles", tiles),
        mock.patch.object(sampling, "default_tiles", split),
    ):
        build(checkpoint, "cuda-sm80", dtype, quant, out=folder, verify=False)
    command = [sys.executable, "-c", CHECK, str(folder)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
