"""Templates and tuned records: every kernel has a template, every target compiles, decisions change no result."""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import tvm
import tvm_ffi

import tvm_attn
from tests.kernels import devices
from tvm_attn import _resources, kernels, targets
from tvm_attn import build as build_command
from tvm_attn._resources import resource_dir
from tvm_attn.compiler.build import build
from tvm_attn.compiler.devices import layout_for
from tvm_attn.compiler.devices.cpu import CpuBackend
from tvm_attn.compiler.pipeline import compile_program
from tvm_attn.config import PRESETS, GPT2Config
from tvm_attn.errors import ScheduleError
from tvm_attn.inventory import obstacle
from tvm_attn.kernels import (
    Advance,
    AttentionOperator,
    Case,
    DecodeAttention,
    Head,
    Linear,
    PackPlain,
    PrefillAttention,
    cpu,
    cuda,
    gpu,
)
from tvm_attn.kernels.base import TENSOR_CORE_DTYPES, shape_of
from tvm_attn.kernels.template import Template
from tvm_attn.model.checkpoint import random_params
from tvm_attn.model.gpt2 import build_program
from tvm_attn.model.module import Program
from tvm_attn.schedule import Record, RecordBook, records, schedule, supports, template_for
from tvm_attn.schedule.plan import plan
from tvm_attn.storage import QUANTIZATIONS
from tvm_attn.targets import CpuTarget, Target

CONFIG = GPT2Config(
    vocab_size=300, n_positions=40, n_embd=64, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
)
KERNEL = Linear(64, 256, 8, 32, "float32")
RECORD = Record("cpu.matmul", 2, shape_of(KERNEL), {"group_block": 2}, 12.5, 0.75, "0.27.0", "2026-01-02")
MATMUL = next(template for template in cpu.TEMPLATES if template.name == "cpu.matmul")


@pytest.fixture
def book_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the place of `schedules/`."""
    folder = tmp_path / "schedules"
    folder.mkdir()
    monkeypatch.setattr(_resources, "resource_dir", lambda name: {"schedules": folder}.get(name, resource_dir(name)))
    return folder


def named(name: str) -> Target:
    """A processor with 16 lanes of that name, for which there are no records."""
    return replace(targets.read("cpu-x86-64-v4"), name=name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(dict(random_params(CONFIG)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


@cache
def program_for(name: str) -> Program:
    target = targets.read(name)
    return build_program(CONFIG, layout_for(CONFIG, target, "float32", "none"), 40, 8)


def write(folder: Path, target: str, *given: Record | str) -> None:
    (folder / target).mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else record.to_line() for record in given]
    (folder / target / "cpu.matmul.jsonl").write_text("\n".join(lines) + "\n")


# --- templates ---


@pytest.mark.parametrize("name", targets.names())
def test_every_family_has_one_template(name: str) -> None:
    target = targets.read(name)
    for family in kernels.FAMILIES:
        kernel = next(iter(family.cases())).kernel
        assert isinstance(kernel, family)
        if family is not Advance or target.device == "cuda":
            assert template_for(kernel, target).takes(kernel)


@pytest.mark.parametrize("templates", [cpu.TEMPLATES, gpu.TEMPLATES, cuda.TEMPLATES], ids=["cpu", "gpu", "cuda"])
def test_templates_of_a_device_class(templates: tuple[Template, ...]) -> None:
    """A kernel has one at most: a greedy step is for tensor cores only, whose other kernels have two."""
    scheduled = [
        (family, dtype) for template in templates for family in template.families for dtype in template.activations
    ]
    wanted = [(family.family, "float32") for family in kernels.FAMILIES if family is not Advance]
    if templates is cuda.TEMPLATES:
        wanted.append(("advance", "float32"))
        families = {family.family for family in kernels.FAMILIES if "activations" in {f.name for f in fields(family)}}
        wanted += [(family, dtype) for family in families for dtype in TENSOR_CORE_DTYPES]
    assert sorted(scheduled) == sorted(wanted)
    assert len({template.name for template in templates}) == len(templates)


def test_what_a_target_has_no_template_for() -> None:
    kernel = replace(KERNEL, weights="float16", activations="float16")
    for name in ("cpu-x86-64", "vulkan-generic"):
        assert not supports(kernel, targets.read(name))
        with pytest.raises(ScheduleError, match="no schedule template for kernel 'linear' with float16 activations"):
            schedule(kernel, targets.read(name))
    assert supports(kernel, targets.read("cuda"))
    assert not supports(replace(KERNEL, weights="bfloat16"), targets.read("vulkan-generic"))


def test_missing_template_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TEMPLATES", ())
    target = targets.detect_cpu()
    with pytest.raises(ScheduleError, match=r"no schedule template for kernel 'linear' on device class 'cpu'"):
        schedule(KERNEL, target)


@pytest.mark.parametrize(
    "decisions", [{"group_block": 3}, {"group_block": 0}, {"group_block": "2"}, {"k_unroll": None}, {"k_unroll": 16}]
)
def test_decision_that_is_no_candidate(decisions: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match=r"is not one of \[1, 2, 4, 8"):
        schedule(KERNEL, targets.detect_cpu(), decisions)


def small_cases() -> Iterator[Case]:
    """A kernel of every template that has choices, small enough to compile quickly and large enough to need loops."""
    wanted = (
        Linear(32, 64, 8, 32, "float32", activation="relu"),
        Linear(96, 24, 8, 8, "int8"),
        Head(128, 1021, 1, 32, "float32", groups=1),
        PrefillAttention(3, 20, 45, 8, "float32", 0.3),
        DecodeAttention(2, 64, 600, 8, "float16", 0.125),
        AttentionOperator(2, 2, 20, 12, "float32", 0.3),
    )
    for kernel in wanted:
        yield next(case for case in type(kernel).cases() if case.kernel == kernel)
    yield next(case for case in PackPlain.cases() if case.kernel.transposed)


CASES = list(small_cases())


def choices_of(case: Case, target: Target) -> dict[str, list[int]]:
    """The candidates of each decision that are not its default."""
    others: dict[str, list[int]] = {}

    def choose(name: str, candidates: Any, default: int) -> int:
        assert default in candidates
        others[name] = [candidate for candidate in candidates if candidate != default]
        return default

    template_for(case.kernel, target).apply(case.kernel, target, choose)
    return others


def assert_correct(case: Case, target: Target, decisions: dict[str, int]) -> None:
    function = devices.build(schedule(case.kernel, target, decisions), target)
    devices.assert_close(case, devices.run(function, case, tvm.cpu()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel.family}-{case.name}")
def test_every_candidate_gives_the_same_result(case: Case) -> None:
    """What a search may choose, one decision at a time; the defaults are tested with the kernels."""
    target = targets.detect_cpu()
    choices = choices_of(case, target)
    assert choices
    for name, candidates in choices.items():
        for candidate in candidates:
            assert_correct(case, target, {name: candidate})


def test_every_template_with_choices_is_tested() -> None:
    target = targets.detect_cpu()
    tested = {template_for(case.kernel, target).name for case in CASES}
    for family in kernels.FAMILIES:
        for case in islice(family.cases(), 2):
            if supports(case.kernel, target):
                assert not choices_of(case, target) or template_for(case.kernel, target).name in tested


# --- records ---


def test_a_record_is_one_line_of_json() -> None:
    line = RECORD.to_line()
    assert "\n" not in line
    assert Record.from_line(line, "here") == RECORD
    assert json.loads(line)["decisions"] == {"group_block": 2}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "5",
        "null",
        "{}",
        "nonsense",
        '{"template": "x"}',
        replace(RECORD, date="").to_line()[:-1] + ', "a": 1}',
    ],
)
def test_malformed_line_is_named(book_folder: Path, line: str) -> None:
    write(book_folder, "cpu-x", RECORD, "", line)
    with pytest.raises(ScheduleError, match=r"cpu-x/cpu\.matmul\.jsonl:3 is not a tuned record") as error:
        RecordBook.load(named("cpu-x"))
    assert len(str(error.value).splitlines()) == 1


WRONG: list[tuple[str, Any, str]] = [
    *(("time_us", value, "give a positive number") for value in ("fast", None, 0, -1.0, True, [], 10**310)),
    *(("version", value, "version is .*; give an integer from 0") for value in (None, "2", 2.0, True, -1, 10**9, {})),
    *(("template", value, "template is") for value in (None, "", "../x", 5, ["cpu.matmul"], "x" * 10_000, "a\nb")),
    *(("decisions", value, "give integers by name") for value in (None, [], {"x": True}, {"x": "2"}, {"x": 1.0})),
    *(("shape", value, "give the kernel's sizes") for value in (None, [], "x", {"x": []}, {"x": {"y": 1}})),
    *(("fraction_of_peak", value, "give a positive number or null") for value in ("half", True, -0.1, 0, [])),
    *((field, value, f"{field} is .*; give text") for field in ("tvm", "date") for value in (None, 5, [], "", "a\nb")),
    ("author", "me", "the key 'author' is unknown"),
    ("x" * 10_000, "me", "the key 'xxx.* is unknown"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=lambda item: repr(item)[:30])
def test_a_wrong_value_is_named(field: str, value: Any, message: str) -> None:
    line = json.dumps(json.loads(RECORD.to_line()) | {field: value})
    with pytest.raises(ScheduleError, match=f"^x:7 is not a tuned record: .*{message}") as caught:
        Record.from_line(line, "x:7")
    assert len(str(caught.value)) < 400
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("field", sorted(json.loads(RECORD.to_line())))
def test_a_missing_value_is_named(field: str) -> None:
    record = json.loads(RECORD.to_line())
    del record[field]
    with pytest.raises(ScheduleError, match=f"^x:7 is not a tuned record: it lacks the key '{field}'"):
        Record.from_line(json.dumps(record), "x:7")


@pytest.mark.parametrize(
    "line", ["null", "[]", "5", '"x"', "NaN", "[" * 100_000, "9" * 10_000, '{"time_us": 1e400}', '{"a": 1, "a": 2}']
)
def test_lines_that_are_no_table(line: str) -> None:
    with pytest.raises(ScheduleError, match=r"^x:7 is not a tuned record: it is") as caught:
        Record.from_line(line, "x:7")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "no text", "100 GiB", "a dangling link"])
def test_files_that_are_no_records(kind: str, book_folder: Path) -> None:
    path = book_folder / "cpu-x" / "cpu.matmul.jsonl"
    path.parent.mkdir()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"\xff\xfe")
        if kind == "100 GiB":
            os.truncate(path, 100 << 30)
    with pytest.raises(ScheduleError, match=r"cpu\.matmul\.jsonl (cannot be read|is not UTF-8|is larger|is missing)"):
        RecordBook.load(named("cpu-x"))


@pytest.mark.parametrize("field", ["shape", "decisions"])
def test_objects_must_be_objects(field: str) -> None:
    line = json.dumps(json.loads(RECORD.to_line()) | {field: [1]})
    with pytest.raises(ScheduleError, match=r"^x:7 is not a tuned record"):
        Record.from_line(line, "x:7")


def test_a_record_is_found_by_template_version_shape_and_dtype(book_folder: Path) -> None:
    write(book_folder, "cpu-x", RECORD)
    book = RecordBook.load(named("cpu-x"))
    assert book.find(MATMUL, KERNEL) == RECORD
    for other in (
        replace(KERNEL, in_features=128),
        replace(KERNEL, weights="float16"),
        replace(KERNEL, activation="relu"),
        replace(KERNEL, rows=1, groups=1),
    ):
        assert book.find(MATMUL, other) is None
    assert book.find(replace(MATMUL, version=3), KERNEL) is None
    assert book.find(Template("cpu.other", 2, MATMUL.families, MATMUL.apply), KERNEL) is None
    assert RecordBook.load(named("cpu-y")).find(MATMUL, KERNEL) is None


def test_the_last_of_two_records_counts(book_folder: Path) -> None:
    newer = replace(RECORD, decisions={"group_block": 8})
    write(book_folder, "cpu-x", RECORD, newer)
    assert RecordBook.load(named("cpu-x")).find(MATMUL, KERNEL) == newer


BUNDLED = Path(__file__).parents[2] / "schedules"


@pytest.mark.parametrize("name", sorted(path.name for path in BUNDLED.iterdir() if path.is_dir()))
def test_every_bundled_record_is_that_of_a_kernel(name: str) -> None:
    """For each line there is a published model whose kernel finds it, and its template takes the decisions."""
    target = targets.read(name)
    book = RecordBook.load(target)
    found = {}
    for config in (replace(config, n_layer=1) for config in PRESETS.values()):
        for dtype, quant in product(target.dtypes, QUANTIZATIONS):
            for kernel in build_program(config, layout_for(config, target, dtype, quant)).kernels.values():
                record = book.find(template_for(kernel, target), kernel)
                if record is not None and record.key not in found:
                    found[record.key] = plan(kernel, target, book)
    lines = [(path, record) for path in sorted((BUNDLED / name).iterdir()) for record in records.read_records(path)]
    assert len({record.key for _, record in lines}) == len(lines)
    for path, record in lines:
        assert path.name == f"{record.template}.jsonl"
        planned = found.pop(record.key)
        assert planned.record == record
        taken = {decision.name: decision.value for decision in planned.decisions}
        assert taken == record.decisions
        assert all(decision.source == "record" for decision in planned.decisions)
    assert not found


def test_keys_hold_no_tiles() -> None:
    """A kernel's fields are sizes and dtypes: a template can have another tile, or another default."""
    names = {field.name for family in kernels.FAMILIES for field in fields(family)}
    assert names == {
        *("in_features", "out_features", "width", "rows", "columns", "groups", "max_groups", "vocabulary", "context"),
        *("heads", "head_dim", "weights", "dtype", "cache_dtype", "activations", "activation", "epsilon", "scale"),
        *("count", "transposed"),
        *("key_heads", "value_dim", "softcap", "mask", "causal", "left", "right", "stage"),
    }


# --- folders and related targets ---


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "tvm-attn"


def block(size: int) -> Record:
    return replace(RECORD, decisions={"group_block": size})


def test_the_order_of_folders(book_folder: Path, user: Path, tmp_path: Path) -> None:
    given, target = tmp_path / "given", named("cpu-x")
    write(book_folder, "cpu-x86-64-v4", block(16))
    assert plan(KERNEL, target, RecordBook.load(target)).source == "related record of cpu-x86-64-v4"
    for size, folder in ((1, book_folder), (2, user / "schedules"), (4, given)):
        write(folder, "cpu-x", block(size))
        (own, other) = RecordBook.load(target, given if folder == given else None).entries(MATMUL, KERNEL)
        assert (own.record, own.source) == (block(size), "record")
        assert own.file == folder / "cpu-x" / "cpu.matmul.jsonl"
        assert (other.record, other.related) == (block(16), "cpu-x86-64-v4")
    assert records.user_folder() == user / "schedules"
    write(tmp_path, "flat", block(8))
    assert RecordBook.load(target, tmp_path / "flat").find(MATMUL, KERNEL) == block(8)


def test_a_folder_without_records(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / ("n" * 300)):
        with pytest.raises(ScheduleError, match=r"holds no records: name a folder|cannot be read") as error:
            RecordBook.load(named("cpu-x"), place)
        assert len(str(error.value).splitlines()) == 1


def test_a_related_record_that_does_not_fit_is_left_out(book_folder: Path) -> None:
    target = named("cpu-x")
    write(book_folder, "cpu-x86-64-v4", block(3))
    assert plan(KERNEL, target, RecordBook.load(target)).source == "default"
    write(book_folder, "cpu-znver4", block(4))
    planned = plan(KERNEL, target, RecordBook.load(target))
    assert planned.source == "related record of cpu-znver4"
    assert planned.decisions[0].value == 4
    write(book_folder, "cpu-x86-64-v3", block(8))  # other registers
    assert "cpu-x86-64-v3" not in {entry.related for entry in RecordBook.load(target).entries(MATMUL, KERNEL)}


def test_a_malformed_file_of_a_related_target_is_named(book_folder: Path) -> None:
    write(book_folder, "cpu-x86-64-v4", "nonsense")
    write(book_folder, "cpu-znver4", block(4))
    with pytest.warns(UserWarning, match=r"left out: .*cpu-x86-64-v4/cpu\.matmul\.jsonl:1 is not a tuned record"):
        book = RecordBook.load(named("cpu-x"))
    assert [entry.related for entry in book.entries(MATMUL, KERNEL)] == ["cpu-znver4"]


def test_what_a_target_is_based_on_comes_first(user: Path) -> None:
    znver4 = targets.read("cpu-znver4")
    assert [other.name for other in targets.related(znver4)] == ["cpu-x86-64-v4"]
    assert [other.name for other in targets.related(named("cpu-x"))] == ["cpu-x86-64-v4", "cpu-znver4"]
    based = replace(named("cpu-x"), based_on="cpu-znver4")
    assert [other.name for other in targets.related(based)] == ["cpu-znver4", "cpu-x86-64-v4"]
    assert not targets.related(targets.read("cuda-sm80"))
    gpu = replace(targets.read("cuda-sm80"), name="mine", based_on="cuda-sm80")
    assert [other.name for other in targets.related(gpu)] == ["cuda-sm80"]
    assert not targets.related(replace(gpu, based_on="cpu-znver4"))


# --- the compiler ---


def test_a_build_says_what_it_used(
    book_folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = targets.read("cpu-x86-64-v4")
    kernel = linear_of(program_for(target.name))
    version = template_for(kernel, target).version
    record = replace(RECORD, version=version, shape=shape_of(kernel), decisions={"group_block": 1})
    other = replace(record, shape=record.shape | {"activation": "gelu_new", "out_features": 256})
    write(book_folder, "cpu-znver4", record, other)
    write(tmp_path / "given", target.name, record)
    options = ["--model", str(checkpoint), "--target", target.name, "--records", str(tmp_path / "given"), "--no-verify"]
    assert build_command.main([*options, "--out", str(tmp_path / "artifact")]) == 0
    said = capsys.readouterr().out
    assert f" kernels with choices use 1 records of {tmp_path / 'given' / target.name}, " in said
    (library,) = json.loads((tmp_path / "artifact" / "manifest.json").read_bytes())["libraries"]
    assert Counter(library["schedules"].values()).keys() >= {"record", "default"}
    assert set(library["schedules"]) <= set(library["kernels"])
    assert record.to_line() in library["records"]

    write(tmp_path / "empty", target.name)
    options[options.index("--records") + 1] = str(tmp_path / "empty")
    assert build_command.main([*options, "--json", "--out", str(tmp_path / "artifact")]) == 0
    sources = json.loads(capsys.readouterr().out)["schedules"][target.name]
    assert set(sources["related"].values()) == {"cpu-znver4"}
    assert not sources["records"] and sources["defaults"]


def linear_of(program: Program) -> Linear:
    return next(kernel for kernel in program.kernels.values() if isinstance(kernel, Linear) and kernel.rows > 1)


def test_decisions_of_a_record_are_used(book_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The manifest tells which, and the function is another one; its results are tested above."""
    target = targets.detect_cpu()
    kernel, decisions = linear_of(program_for(target.name)), {"group_block": 1, "k_unroll": 8}
    assert not tvm_ffi.structural_equal(schedule(kernel, target, decisions), schedule(kernel, target))
    version = template_for(kernel, target).version
    record = replace(RECORD, version=version, shape=shape_of(kernel), decisions=decisions)
    write(book_folder, target.name, record, replace(record, shape=record.shape | {"in_features": 9999}))
    built = build(checkpoint, target.name, out=tmp_path / "artifact", verify=False)
    (library,) = json.loads((built.folder / "manifest.json").read_bytes())["libraries"]
    assert library["records"] == [record.to_line()]


def test_record_that_does_not_fit_stops_the_compiler(book_folder: Path, tmp_path: Path) -> None:
    target = targets.detect_cpu()
    program = program_for(target.name)
    kernel = linear_of(program)
    version = template_for(kernel, target).version
    write(book_folder, target.name, replace(RECORD, version=version, shape=shape_of(kernel), decisions={"k_unroll": 3}))
    with pytest.raises(ScheduleError, match="k_unroll=3 is not one of"):
        compile_program(program, target, tmp_path / "lib.so")
    assert not list(tmp_path.glob("lib*"))


# --- targets ---


def others() -> list[str]:
    """The processors of this architecture that the rest of the tests does not compile for."""
    here, known = targets.detect_cpu(), map(targets.read, targets.names())
    fitting = [target for target in known if isinstance(target, CpuTarget) and target.architecture == here.architecture]
    return [target.name for target in fitting if target.name != here.name]


@pytest.mark.slow
def test_all_targets_of_this_architecture_in_one_artifact(checkpoint: Path, tmp_path: Path) -> None:
    """Each is compiled, and checked where this machine can run it; the widest is loaded."""
    names = others()
    built = build(checkpoint, ",".join(names), out=tmp_path / "artifact")
    fitting = [name for name in names if obstacle(targets.read(name)) is None]
    assert "cpu-x86-64" in names or "cpu-aarch64" in names
    assert {name for name, report in built.reports.items() if report} == set(fitting)
    assert all(check.passed for report in built.reports.values() if report for check in report.checks)
    for name in set(names) - set(fitting):
        assert any(f"lib-{name}.so was compiled but not checked" in note for note in built.notes)
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_bytes())
    assert [library["target"] for library in manifest["libraries"]] == names
    for library, name in zip(manifest["libraries"], names, strict=True):
        assert (library["verification"] is not None) == (name in fitting)
        assert library["features"] == list(targets.read(name).features)
    assert tvm_attn.load(tmp_path / "artifact").logits([[1, 2, 3]]).shape == (1, 3, CONFIG.vocab_size)


MACHINES = {"x86_64": 62, "aarch64": 183}
"""`e_machine` of an ELF file."""


@pytest.mark.parametrize("name", [n for n in targets.names() if targets.read(n).architecture != os.uname().machine])
def test_other_architectures_compile_to_object_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cross compiler: TVM leaves the object files in an archive, without threads."""
    monkeypatch.setattr("tvm_attn.compiler.pipeline.find_cxx", lambda architecture: "")
    monkeypatch.setattr(CpuBackend, "link", lambda self, build, _, library, __: build().export_library(str(library)))
    target = targets.read(name)
    compile_program(program_for(target.name), target, tmp_path / "lib.tar")
    with tarfile.open(tmp_path / "lib.tar") as archive:
        objects = [archive.extractfile(member).read() for member in archive if member.name.endswith(".o")]  # type: ignore[union-attr]
    assert objects
    for content in objects:
        assert content[:4] == b"\x7fELF"
        assert int.from_bytes(content[18:20], "little") == MACHINES[target.architecture]
    assert any(b"prefill_attention" in content for content in objects)
