"""TVM_ATTN_DUMP: what a build made on its way can be read."""

from pathlib import Path

import pytest

from tvm_attn import targets
from tvm_attn.compiler.devices import layout_for
from tvm_attn.compiler.pipeline import compile_program
from tvm_attn.config import GPT2Config
from tvm_attn.errors import CompileError
from tvm_attn.model.gpt2 import build_program

SMALL = GPT2Config(vocab_size=300, n_positions=40, n_embd=64, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
PHASES = ["program", "scheduled", "fused", "calls", "planned", "captured", "lowered"]


def compile_for(name: str, library: Path) -> None:
    target = targets.resolve(name)
    compile_program(build_program(SMALL, layout_for(SMALL, target, "float32", "none"), 48, 8), target, library)


@pytest.mark.parametrize(("target", "code"), [("cpu", {".ll"}), ("vulkan", {".ll", ".spvasm"})])
def test_every_phase_is_written(target: str, code: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_ATTN_DUMP", str(tmp_path / "dump"))
    compile_for(target, tmp_path / "lib-a.so")
    files = sorted((tmp_path / "dump" / "lib-a").iterdir())
    assert [file.name for file in files[: len(PHASES)]] == [f"{i:02}-{phase}.py" for i, phase in enumerate(PHASES, 1)]
    assert {file.suffix for file in files[len(PHASES) :]} == code
    texts = {file.stem[3:]: file.read_text() for file in files}
    # Kernels are declarations before they are scheduled; layers are whole kernels after they are fused.
    assert "for " not in texts["program"] and "for " in texts["scheduled"]
    assert ("Primitive" in texts["scheduled"]) == (target == "cpu") and "Primitive" not in texts["fused"]
    assert "call_tir" in texts["fused"] and "call_tir" not in texts["calls"]
    assert "alloc_storage" in texts["planned"] and "vm.builtin" in texts["lowered"]


def test_nothing_is_written_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVM_ATTN_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    compile_for("cpu", tmp_path / "lib-a.so")
    assert [file.name for file in tmp_path.iterdir()] == ["lib-a.so"]


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TVM_ATTN_DUMP", str(tmp_path / "file"))
    with pytest.raises(CompileError, match=r"^TVM_ATTN_DUMP: cannot write .*: Not a directory$"):
        compile_for("cpu", tmp_path / "lib-a.so")
    assert not (tmp_path / "lib-a.so").exists()
