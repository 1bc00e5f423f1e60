"""The list of kernels: what each gets on a target, and where its decisions come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tvm_ffi

from tvm_attn import list_kernels, targets
from tvm_attn.compiler.plan import kernel_plan
from tvm_attn.config import PRESETS
from tvm_attn.errors import TargetError
from tvm_attn.kernels import Linear
from tvm_attn.schedule import Record, schedule, template_for
from tvm_attn.schedule.base import FixedChooser
from tvm_attn.schedule.records import read_records

SCHEDULES = Path(__file__).parents[1] / "schedules"
CONFIG = replace(PRESETS["gpt2"], n_layer=1)


def records_of(target: str) -> list[Record]:
    return [record for path in (SCHEDULES / target).glob("*.jsonl") for record in read_records(path)]


def test_records_and_defaults_are_told_apart() -> None:
    planned = kernel_plan(CONFIG, targets.read("cpu-znver4"))
    used = [entry.record for entry in planned if entry.record is not None]
    assert {record.key for record in used} <= {record.key for record in records_of("cpu-znver4")}
    assert used
    for entry in planned:
        decisions = {decision.name: decision.value for decision in entry.decisions}
        sources = {decision.source for decision in entry.decisions}
        if entry.record is None:
            assert sources <= {"default"}
        else:
            assert sources == {"record"} and decisions == entry.record.decisions


def test_a_record_with_some_decisions_leaves_the_others_to_the_template() -> None:
    kernel, target = Linear(64, 96, 8, 32, "float32"), targets.read("cpu-x86-64-v3")
    chooser = FixedChooser({"k_unroll": 2})
    template_for(kernel, target).apply(kernel, target, chooser)
    assert chooser.taken["k_unroll"] == 2
    assert set(chooser.taken) > {"k_unroll"}


def test_functions_are_those_of_a_build() -> None:
    target = targets.read("cpu-x86-64-v3")
    for entry in kernel_plan(replace(CONFIG, n_embd=64, n_head=2, n_inner=128, vocab_size=300), target):
        assert tvm_ffi.structural_equal(entry.function, schedule(entry.kernel, target))


def test_a_kernel_is_listed_once_for_tensor_cores() -> None:
    planned = kernel_plan(CONFIG, targets.read("cuda-sm90"), "float16", "int4")
    assert len({entry.kernel for entry in planned}) == len(planned)
    templates = {entry.template.name for entry in planned}
    assert {"cuda.linear", "cuda.prefill_attention", "cuda.decode_attention", "cuda.advance"} <= templates


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert list_kernels.main(["--target", "cpu-x86-64-v3", "--model", "demo"]) == 0
    said = capsys.readouterr().out
    for text in ("cpu.matmul 2", "cpu.prefill_attention 1", "group_block=", "key_chunk=256", "default", "one row"):
        assert text in said
    assert "record" not in said


def test_related_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A processor of one's own with the registers of Zen 4 takes its records, and says so."""
    path = tmp_path / "mine.toml"
    targets.write(replace(targets.read("cpu-znver4"), based_on="cpu-znver4"), path)
    options = ["--target", str(path)]
    record = next(entry.record for entry in kernel_plan(CONFIG, targets.read("cpu-znver4")) if entry.record)
    assert list_kernels.main([*options, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    sources = {decision["from"] for entry in listed["kernels"] for decision in entry["decisions"].values()}
    assert listed["target"] == "mine"
    assert {"related record of cpu-znver4", "default"} <= sources
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "some.jsonl").write_text(record.to_line())
    assert list_kernels.main([*options, "--records", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert any(row.split()[-1:] == ["record"] for row in rows)
    assert any(row.rstrip().endswith("related record of cpu-znver4") for row in rows)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target", "vulkan-generic", "--model", "demo", "--dtype", "float16", "--quant", "int8", "--json"]
    assert list_kernels.main(options) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["target"], listed["dtype"], listed["quant"]) == ("vulkan-generic", "float16", "int8")
    by_family = {entry["kernel"]["family"]: entry for entry in listed["kernels"]}
    assert by_family["quantize_rows"]["template"] == "gpu.quantize_rows"
    assert by_family["layer_norm"]["decisions"] == {"threads": {"value": 128, "from": "default"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cpu-z80"], "unknown target 'cpu-z80'"),
        (["--target", "vulkan-generic", "--dtype", "bfloat16"], "dtype 'bfloat16' is not available"),
        (["--target", "cpu", "--model", "no-such-model-anywhere"], "no-such-model-anywhere"),
    ],
)
def test_errors_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert list_kernels.main(options) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and message in said.err and said.err.count("\n") == 1


def test_types_are_checked() -> None:
    with pytest.raises(TargetError, match="quantization 'int3' is not available"):
        kernel_plan(CONFIG, targets.read("cpu-x86-64-v3"), "float32", "int3")
