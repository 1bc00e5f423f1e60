"""What quantization costs: the figures against transformers'."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import tvm_attn
from tvm_attn.compiler.accuracy import measure_accuracy
from tvm_attn.config import param_shapes
from tvm_attn.runtime.artifact import Artifact

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def test_an_unquantized_model_agrees_with_the_reference(demo_artifact: Path, demo_model_dir: Path) -> None:
    artifact, engine = Artifact(demo_artifact), tvm_attn.load(demo_artifact, "cpu", max_batch=2).engine
    params = [(name, artifact.parameters.read(name)) for name in param_shapes(artifact.config)]
    text = artifact.tokenizer_json()
    assert text is not None
    found = measure_accuracy(artifact.config, params, engine, text)
    assert found.tokens == 2048 and found.top1 > 0.999 and 0 <= found.kl_divergence < 1e-8

    model = tvm_attn.load(demo_artifact, "cpu")
    assert model.tokenizer is not None
    ids = model.tokenizer.encode((demo_model_dir / "validation.txt").read_text(encoding="utf-8"))[:2048]
    theirs, total = GPT2LMHeadModel.from_pretrained(demo_model_dir, dtype=torch.float32).eval(), 0.0
    for window in np.array_split(ids, 8):
        tokens = torch.tensor(window[None])
        with torch.no_grad():
            total += float(theirs(tokens, labels=tokens).loss) * 255
    expected = pytest.approx(math.exp(total / (8 * 255)), rel=1e-4)
    assert found.perplexity == expected and found.reference_perplexity == expected
    assert f"perplexity {found.perplexity:.2f} instead of {found.reference_perplexity:.2f}" in found.summary()
    assert json.loads(json.dumps(found.to_dict()))["perplexity"] == found.perplexity


def test_random_tokens_have_no_perplexity(demo_artifact: Path) -> None:
    artifact, engine = Artifact(demo_artifact), tvm_attn.load(demo_artifact, "cpu", max_batch=1).engine
    params = [(name, artifact.parameters.read(name)) for name in param_shapes(artifact.config)]
    found = measure_accuracy(artifact.config, params, engine, None)
    assert found.perplexity is None and found.reference_perplexity is None
    assert "perplexity" not in found.summary()
