"""GPT-2 from ONNX files: configuration and weights are those of the model that was exported, whoever exported it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tests.onnx import exporters
from tests.onnx.exporters import CASES
from tests.onnx.test_export import SMALL, save_checkpoint
from tvm_attn import build as command
from tvm_attn.config import ACTIVATIONS, GPT2Config
from tvm_attn.errors import CheckpointError, OnnxError, VerificationError
from tvm_attn.model.checkpoint import open_checkpoint
from tvm_attn.model.weights import open_config, open_weights
from tvm_attn.onnx.checkpoint import OnnxCheckpoint, open_onnx
from tvm_attn.onnx.compare import compare_with_file
from tvm_attn.onnx.export import export
from tvm_attn.quantization import relative_error

CONFIG = GPT2Config(**exporters.SIZES, bos_token_id=None, eos_token_id=None)
# The largest squared error that rounding normally distributed weights to so many bits makes, relative to their squares.
ROUNDING = {"int8": 1e-3, "nbits-8": 1e-4, "nbits-4": 2e-2, "half": 2e-7}


def stored() -> dict[str, np.ndarray]:
    """The weights that were exported."""
    state = exporters.model().state_dict()
    return {name.removeprefix("transformer."): tensor.numpy() for name, tensor in state.items()}


@pytest.mark.slow  # each takes one to ten seconds, most of it PyTorch's export
@pytest.mark.parametrize("name", CASES)
def test_every_exporter(name: str, tmp_path: Path, one_torch_thread: None) -> None:
    checkpoint = open_onnx(CASES[name](tmp_path))
    config, params, expected = checkpoint.config, dict(checkpoint.params()), stored()
    untied = "untied" in name or "int8" in name or "nbits" in name
    fixed = "static" in name and len(params["wpe.weight"]) < CONFIG.n_positions  # positions that were computed
    wanted = replace(
        CONFIG,
        n_positions=5 if fixed else CONFIG.n_positions,
        tie_word_embeddings=not untied,
        activation_function="gelu" if "gelu" in name else "gelu_new",
    )
    assert config == wanted
    bound = next((value for part, value in ROUNDING.items() if part in name), 0)
    for key, array in params.items():
        if key == "lm_head.weight" and "untied" in name:
            continue
        original = expected[key][: len(array)]
        if bound:
            assert array.shape == original.shape and relative_error(array.astype(np.float32), original) < bound, key
        else:
            np.testing.assert_array_equal(array, original, strict=True, err_msg=key)
    note = compare_with_file(checkpoint)
    assert note.startswith("ONNX Runtime computes the same logits") == _runs_alone(name), note


def _runs_alone(name: str) -> bool:
    """Whether the file can be run without past keys and values and has logits."""
    return name not in ("zoo-10",) and "static-past" not in name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("opset", [18, 20, 23, 24])
def test_our_own_files(opset: int, dtype: str, demo_model_dir: Path, tmp_path: Path) -> None:
    """Written and read again, weights and configuration are bit by bit the same."""
    file = export(demo_model_dir, tmp_path / "demo.onnx", opset=opset, dtype=dtype, inline_bytes=1000).file
    checkpoint, original = open_onnx(file), open_checkpoint(demo_model_dir)
    assert checkpoint.config == original.config
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}
    for name, array in checkpoint.params():
        np.testing.assert_array_equal(array, weights[name], strict=True, err_msg=name)
    if dtype == "float32":
        for (name, array), (_, expected) in zip(checkpoint.params(), original.params(), strict=True):
            np.testing.assert_array_equal(array, expected.astype(np.float32), strict=True, err_msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("opset", [18, 23])
def test_other_configurations(activation: str, opset: int, tmp_path: Path) -> None:
    config = replace(
        SMALL,
        activation_function=activation,
        n_inner=40,
        layer_norm_epsilon=3e-4,
        tie_word_embeddings=False,
        scale_attn_by_inverse_layer_idx=activation == "relu",
        scale_attn_weights=activation != "silu",
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = save_checkpoint(tmp_path / "model", config)
    file = export(folder, tmp_path / "model.onnx", opset=opset).file
    assert open_onnx(file).config == config
    assert "the same logits" in compare_with_file(open_onnx(file))


def test_names_mean_nothing(demo_model_dir: Path, tmp_path: Path) -> None:
    """All names become numbers; nodes come in another order."""
    file = export(demo_model_dir, tmp_path / "demo.onnx", opset=18).file
    model = onnx.load(file)
    names: dict[str, str] = {"": ""}
    graph = model.graph
    del model.metadata_props[:]
    for entry in (*graph.input, *graph.output, *graph.initializer):
        entry.name = names.setdefault(entry.name, f"n{len(names)}")
    for node in graph.node:
        node.name = ""
        for field in (node.input, node.output):
            field[:] = [names.setdefault(name, f"n{len(names)}") for name in field]
    nodes = sorted(graph.node, key=lambda node: hashlib.sha256(node.output[0].encode()).hexdigest())
    del graph.node[:]
    graph.node.extend(nodes)
    (tmp_path / "renamed").mkdir()
    onnx.save(model, tmp_path / "renamed" / "renamed.onnx")
    found = open_onnx(tmp_path / "renamed" / "renamed.onnx")
    for (name, array), (_, expected) in zip(found.params(), open_onnx(file).params(), strict=True):
        np.testing.assert_array_equal(array, expected, err_msg=name)


def test_the_artifact_is_that_of_the_checkpoint(
    demo_model_dir: Path, demo_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model and weights are bit by bit the same; so is the library, up to the order in which TVM names things."""
    file, out = export(demo_model_dir, tmp_path / "demo.onnx").file, tmp_path / "artifact"
    assert command.main(["--model", str(file), "--target", "cpu", "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weights"] == str(file)
    assert any("ONNX Runtime computes the same logits" in note for note in found["notes"])
    assert all(found["verification"].values())
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (out, demo_artifact)]
    for name in ("model", "dtype", "quantization"):
        assert manifests[0][name] == manifests[1][name]
    paths = [path for path in (demo_artifact / "params").rglob("*") if path.is_file()]
    assert paths
    for path in paths:
        assert (out / path.relative_to(demo_artifact)).read_bytes() == path.read_bytes(), path


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in ((None, "none.onnx is missing"), (b"?", "no ONNX file")):
        if content:
            (tmp_path / "none.onnx").write_bytes(content)
        assert command.main(["--model", str(tmp_path / "none.onnx"), "--target", "cpu"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="has its weights as ONNX; name the file itself"):
        (tmp_path / "config.json").write_text("{}")
        open_weights(tmp_path)


def test_what_is_beside_the_file(demo_model_dir: Path, tmp_path: Path) -> None:
    """Tokenizer and token ids are those of Optimum's folder; another model's are left out."""
    file = export(demo_model_dir, tmp_path / "model.onnx").file
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, file)
    assert open_onnx(file).tokenizer.text is None
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((demo_model_dir / name).read_bytes())
    weights = open_weights(file)
    assert weights.config == open_checkpoint(demo_model_dir).config == open_config(file)
    assert weights.tokenizer_json() == open_weights(demo_model_dir).tokenizer_json()
    assert weights.name == tmp_path.name
    small = export(save_checkpoint(tmp_path / "small", SMALL), tmp_path / "small.onnx").file
    weights = open_weights(small)
    assert weights.name == "small" and weights.tokenizer_json() is None
    assert any("the tokenizer beside the file is left out" in note for note in weights.notes)


def test_nan_weights(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", SMALL)
    file = export(folder, tmp_path / "model.onnx").file
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.name == "h.1.mlp.c_fc.weight":
            array = numpy_helper.to_array(tensor).copy()
            array[3, 4] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, file)
    with pytest.raises(OnnxError, match=r"h\.1\.mlp\.c_fc\.weight in .* has NaN or infinite values"):
        dict(open_onnx(file).params())


class Changed(exporters.Old):
    """GPT-2 with something that GPT-2 does not have."""

    def __init__(self, change: str) -> None:
        super().__init__(head=True)
        self.change = change
        for block in self.blocks:
            block.forward = lambda x, _, block=block: self.block(block, x)

    def block(self, block: Any, x: Any) -> Any:
        change, attention, width = self.change, block.block.attn, x.size(-1)
        normal = block.block.ln_1(x)
        if change == "rms":
            normal = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * block.block.ln_1.weight
        if change == "post-norm":
            normal = x
        q, k, v = (
            part.view(*part.size()[:-1], block.n_head, -1).permute(0, 2, 1, 3)
            for part in attention.c_attn(normal).split(width, dim=2)
        )
        if change == "rotary":
            half = q.size(-1) // 2
            angle = torch.arange(q.size(-2))[:, None] / 7.0 ** torch.arange(half)
            turn = lambda z: torch.cat((z[..., :half] * angle.cos() - z[..., half:] * angle.sin(), z[..., half:]), -1)  # noqa: E731
            q, k = turn(q), turn(k)
        scores = torch.matmul(q, k.transpose(-1, -2)) / q.size(-1) ** 0.5
        rows = torch.arange(scores.size(-1))
        if change == "alibi":
            scores = scores + (rows - rows[:, None]) * 0.25
        if change == "window":
            scores = scores.masked_fill(rows < rows[:, None] - 2, -1e4)
        if change == "softcap":
            scores = 30 * torch.tanh(scores / 30)
        if change != "bidirectional":
            scores = scores.masked_fill(rows > rows[:, None], float("-inf"))
        y = torch.matmul(torch.softmax(scores, -1), v).permute(0, 2, 1, 3).reshape(x.shape)
        y = attention.c_proj(y)
        if change == "residual scale":
            y = y * 0.5
        middle = x if change == "parallel" else x + y
        normal = block.block.ln_2(middle)
        inner = block.block.mlp.c_fc(normal)
        if change == "gated":
            y2 = block.block.mlp.c_proj(torch.sigmoid(inner) * (inner + normal.repeat(1, 1, 4)))
        elif change == "quick gelu":
            y2 = block.block.mlp.c_proj(inner * torch.sigmoid(1.702 * inner))
        else:
            y2 = block.block.mlp.c_proj(nn.functional.gelu(inner, approximate="tanh"))
        return (x + y + y2 if change == "parallel" else middle + y2), y


CHANGES = {
    "none": None,
    "rms": r"Pow|Mul|ReduceMean",
    "post-norm": r"multiplies a sum with a matrix; GPT-2 normalizes it first",
    "rotary": r"joins sums|multiplies two tensors|scaled or shifted",
    "alibi": r"something is added to the scores of attention",
    "window": r"hides earlier tokens",
    "softcap": r"Softmax node .*: its input is not the scores",
    "bidirectional": r"Softmax node .*: a token sees later ones; GPT-2 is causal",
    "residual scale": r"its result is scaled before it is added to the hidden states",
    "parallel": r"GPT-2's MLP follows its attention",
    "gated": r"node '.*': it multiplies two tensors that GPT-2 does not multiply|sum",
    "quick gelu": r"the function between the matrix products of block 0's MLP is none of gelu_new",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_gpt2(change: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 96, (2, 5))
    path = exporters.export(Changed(change), (ids,), tmp_path / "model.onnx", False, opset_version=17)
    message = CHANGES[change]
    if message is None:
        assert "the same logits" in compare_with_file(open_onnx(path))
        return
    with pytest.raises(OnnxError, match=message) as caught:
        open_onnx(path)
    text = str(caught.value)
    assert text.startswith(f"{path} is not a GPT-2 that can be imported: ") and "\n" not in text and len(text) < 600


def test_other_models(tmp_path: Path) -> None:
    """The message names a node."""
    modules: list[tuple[nn.Module, Any]] = [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.zeros(2, 8)),
        (nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20)), torch.zeros(2, 5, dtype=torch.int64)),
        (nn.Sequential(nn.Embedding(20, 8), nn.LSTM(8, 8)), torch.zeros(2, 5, dtype=torch.int64)),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(2, 3, 8, 8)),
    ]
    for module, argument in modules:
        path = exporters.export(module.eval(), (argument,), tmp_path / "model.onnx", False, opset_version=17)
        with pytest.raises(OnnxError, match="is not a GPT-2 that can be imported: "):
            open_onnx(path)


def test_a_difference_from_the_file_is_found(tmp_path: Path) -> None:
    """The comparison with ONNX Runtime is a defence of its own."""
    folder = save_checkpoint(tmp_path / "model", SMALL)
    file = export(folder, tmp_path / "model.onnx").file
    found = open_onnx(file)
    params = dict(found.params())
    params["h.1.attn.c_proj.bias"] = params["h.1.attn.c_proj.bias"] * np.float32(1.01)
    wrong: Callable[..., OnnxCheckpoint] = replace
    with pytest.raises(VerificationError, match="differ from those of the weights that were recovered"):
        compare_with_file(wrong(found, _params=params))
