"""ONNX files of GPT-2: ONNX Runtime computes from them what transformers computes from the checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from tvm_attn import export as command
from tvm_attn.config import ACTIVATIONS, GPT2Config
from tvm_attn.errors import ConfigError, OnnxError
from tvm_attn.model.checkpoint import open_checkpoint, random_params
from tvm_attn.onnx.export import export
from tvm_attn.quantization import relative_error
from tvm_attn.runtime.artifact import Artifact

SMALL = GPT2Config(vocab_size=61, n_positions=24, n_embd=24, n_layer=2, n_head=3)


def save_checkpoint(folder: Path, config: GPT2Config) -> Path:
    """A checkpoint with random weights in Hugging Face's layout."""
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(dict(random_params(config)), folder / "model.safetensors")
    return folder


def inputs(config: GPT2Config, lengths: list[int], new: int, past: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens of a batch that is padded on the left; all calls with the same seed have the same tokens."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (len(lengths), config.n_positions))
    both, start = past + new, max(lengths)
    mask = (np.arange(both) >= start - np.array(lengths)[:, None]).astype(np.int64)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {"input_ids": ids[:, past:both], "attention_mask": mask, "position_ids": positions[:, past:]}


def run_in_steps(run: Any, config: GPT2Config, lengths: list[int], steps: list[int], dtype: Any) -> np.ndarray:
    """Logits (B, T, vocab_size) of a batch that is computed in calls of so many tokens."""
    shape = (len(lengths), config.n_head, 0, config.head_dim)
    names = [f"{layer}.{kind}" for layer in range(config.n_layer) for kind in ("key", "value")]
    past = {f"past_key_values.{name}": np.zeros(shape, dtype) for name in names}
    found, done = [], 0
    for new in steps:
        logits, *present = run(inputs(config, lengths, new, done) | past)
        assert [array.shape for array in present] == [(*shape[:2], done + new, shape[3])] * len(names)
        past = {f"past_key_values.{name}": array for name, array in zip(names, present, strict=True)}
        found.append(logits)
        done += new
    return np.concatenate(found, 1)


def runtime(file: Path) -> Any:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def expected(folder: Path, config: GPT2Config, lengths: list[int], new: int) -> np.ndarray:
    """transformers' logits in float64."""
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder).double().eval()
    feeds = {name: torch.from_numpy(array) for name, array in inputs(config, lengths, new).items()}
    with torch.inference_mode():
        logits: np.ndarray = model(**feeds).logits.numpy()
    return logits


def tokens(logits: np.ndarray, lengths: list[int]) -> np.ndarray:
    """The logits without those of padding."""
    return np.concatenate([row[max(lengths) - length :] for row, length in zip(logits, lengths, strict=True)])


# The rounding of a few hundred sums in each number format.
BOUNDS = {"float32": 1e-10, "float16": 1e-4, "bfloat16": 1e-3}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("opset", [18, 20, 23, 24])
def test_onnx_runtime_computes_the_same_logits(opset: int, dtype: str, demo_model_dir: Path, tmp_path: Path) -> None:
    config, lengths = open_checkpoint(demo_model_dir).config, [9, 4, 7]
    file = export(demo_model_dir, tmp_path / "demo.onnx", opset=opset, dtype=dtype).file
    operators = {node.op_type for node in onnx.load(file).graph.node}
    assert ("Attention" in operators) == (opset >= 23) and ("Gelu" in operators) == (opset >= 20)
    logits = run_in_steps(runtime(file), config, lengths, [9, 1, 3, 1], np.dtype(dtype))
    reference = expected(demo_model_dir, config, lengths, 14)
    lengths = [length + 5 for length in lengths]
    assert relative_error(tokens(logits, lengths), tokens(reference, lengths)) < BOUNDS[dtype]


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_other_configurations(activation: str, opset: int, tmp_path: Path) -> None:
    config = replace(
        SMALL,
        activation_function=activation,
        n_inner=40,
        layer_norm_epsilon=1e-3,
        tie_word_embeddings=False,
        scale_attn_by_inverse_layer_idx=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    folder = save_checkpoint(tmp_path / "model", config)
    file = export(folder, tmp_path / "model.onnx", opset=opset).file
    logits = run_in_steps(runtime(file), config, [5, 3], [4, 1, 2], np.float32)
    lengths = [7, 5]
    reference = expected(folder, config, [5, 3], 7)
    assert relative_error(tokens(logits, lengths), tokens(reference, lengths)) < BOUNDS["float32"]


def weights(file: Path) -> dict[str, np.ndarray]:
    """The initializers that are no constants of the graph."""
    model = onnx.load(file)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if not t.name.startswith("constant.")}


@pytest.mark.parametrize("opset", [20, 24])
def test_bfloat16(opset: int, tmp_path: Path) -> None:
    """ONNX's own evaluator runs it; ONNX Runtime has no bfloat16 on processors."""
    folder = save_checkpoint(tmp_path / "model", SMALL)
    file = export(folder, tmp_path / "model.onnx", opset=opset, dtype="bfloat16").file
    evaluator = ReferenceEvaluator(str(file))
    logits = run_in_steps(lambda feeds: evaluator.run(None, feeds), SMALL, [5, 3], [4, 1, 2], ml_dtypes.bfloat16)
    reference = expected(folder, SMALL, [5, 3], 7)
    assert logits.dtype == ml_dtypes.bfloat16
    assert relative_error(tokens(logits, [7, 5]).astype(np.float32), tokens(reference, [7, 5])) < BOUNDS["bfloat16"]


def test_an_artifact_gives_its_own_weights(demo_artifact: Path, demo_model_dir: Path, tmp_path: Path) -> None:
    written = export(demo_artifact, tmp_path / "demo.onnx")
    assert (written.dtype, written.source) == ("float32", str(demo_artifact))
    stored = weights(written.file)
    assert list(stored) == list(dict(open_checkpoint(demo_model_dir).params()))
    for name, array in open_checkpoint(demo_model_dir).params():
        np.testing.assert_array_equal(stored[name], array.astype(np.float32), strict=True)
    properties = {entry.key: entry.value for entry in onnx.load(written.file).metadata_props}
    assert GPT2Config.from_dict(json.loads(properties["config.json"])) == Artifact(demo_artifact).config


def test_large_weights_go_to_a_second_file(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", SMALL)
    inline = export(folder, tmp_path / "inline.onnx")
    (tmp_path / "out").mkdir()
    apart = export(folder, tmp_path / "out" / "apart.onnx", inline_bytes=1000)
    assert inline.data is None and apart.data == tmp_path / "out" / "apart.onnx.data"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["apart.onnx", "apart.onnx.data"]
    for name, array in weights(inline.file).items():
        np.testing.assert_array_equal(weights(apart.file)[name], array, strict=True)
    onnx.checker.check_model(str(apart.file), full_check=True)
    both = [run_in_steps(runtime(written.file), SMALL, [6], [6], np.float32) for written in (inline, apart)]
    np.testing.assert_array_equal(*both)


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = save_checkpoint(tmp_path / "model", SMALL), tmp_path / "model.onnx"
    out.write_text("old")

    def refuse(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("no such operator\nsecond line")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(OnnxError, match=f"onnx {onnx.__version__} refuses the exported graph: no such operator"):
        export(folder, out)
    assert out.read_text() == "old" and {path.name for path in tmp_path.iterdir()} == {"model", "model.onnx"}


def test_arguments_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OnnxError, match="opset 17 is not supported; choose one from 18 to 24"):
        export("demo", tmp_path / "x.onnx", opset=17)
    with pytest.raises(ConfigError, match="dtype 'int8' is not supported"):
        export("demo", tmp_path / "x.onnx", dtype="int8")
    with pytest.raises(OnnxError, match=r"cannot be written \(No such file or directory\); name another file"):
        export("demo", tmp_path / "nowhere" / "x.onnx")
    monkeypatch.setattr("tvm_attn.onnx.find_spec", lambda name: None)
    with pytest.raises(OnnxError, match=r"onnx, which is not installed: pip install onnx"):
        export("demo", tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = save_checkpoint(tmp_path / "model", SMALL), tmp_path / "model.onnx"
    arguments = [str(folder), "--opset", "18", "--dtype", "float16", "--out", str(out)]
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {out} ({folder}, float16, opset 18)\n"
    assert printed.err.splitlines() == ["writing the weights", "checking the file"]
    assert command.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["files"], found["opset"], found["dtype"], printed.err) == ([str(out)], 18, "float16", "")
    assert command.main([str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: no such folder")
