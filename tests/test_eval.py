"""The eval command: its figures, and what it refuses."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

import tvm_attn
from tvm_attn import eval as command


class Stdin:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.fixture
def file(tmp_path: Path, demo_model_dir: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes((demo_model_dir / "validation.txt").read_bytes()[:2000])
    return path


def test_figures(demo_artifact: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (score,) = tvm_attn.load(demo_artifact, "cpu").score(file.read_text(encoding="utf-8"), context=64, stride=32)
    arguments = [str(demo_artifact), "--text", str(file), "--context", "64", "--device", "cpu"]
    assert command.main([*arguments, "--json"]) == 0
    out, _ = capsys.readouterr()
    found: dict[str, Any] = json.loads(out)
    assert found.pop("seconds") > 0
    assert found == {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "logprob": score.logprob,
        "scored_tokens": score.tokens,
        "tokens": len(score.token_ids),
        "bytes": 2000,
        "context": 64,
        "stride": 32,
        "device": "cpu",
    }
    assert command.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == f"perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte\n"
    assert f"{score.tokens} of {len(score.token_ids)} tokens scored, 2000 bytes" in err


def test_standard_input(
    demo_artifact: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(demo_artifact), "--text", str(file)]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", Stdin(file.read_bytes()))
    assert command.main([str(demo_artifact), "--text", "-"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", [], "standard input is empty"),
        (b"abc\xff", [], "standard input is not UTF-8 text (byte 3)"),
        (b"a", [], "standard input is one token"),
        (b"abc", ["--stride", "257"], "stride is 257 and context 256"),
        (b"abc", ["--context", "257"], "context is 257; it must be an integer from 2 to 256"),
        (b"abc", ["--context", "1"], "must be at least 2"),
    ],
)
def test_what_is_refused(
    demo_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("sys.stdin", Stdin(content))
    assert command.main([str(demo_artifact), "--text", "-", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read(
    demo_artifact: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(demo_artifact), "--text", str(tmp_path / name)]) == 2
    assert "cannot be read" in capsys.readouterr().err
