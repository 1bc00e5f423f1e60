"""`tvm-attn` and its commands: one entry point, and one line for whatever is wrong with the arguments."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tvm_attn
from benchmarks import compare
from tvm_attn import __main__ as entry
from tvm_attn import bench, build, cli, devices, generate, list_kernels, tune, verify
from tvm_attn.runtime.decoding import GenerationOptions

COMMANDS = {
    "build": build,
    "generate": generate,
    "verify": verify,
    "bench": bench,
    "tune": tune,
    "devices": devices,
    "kernels": list_kernels,
    "compare": compare,
}
HUGE = "9" * 5000
LONG_NAME = "x" * 300


@pytest.fixture
def place(tmp_path: Path, demo_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: a file, an empty folder, one that is no artifact, one that may not be read, a checkpoint."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("text")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0)
    (tmp_path / "checkpoint").symlink_to(demo_model_dir)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    (tmp_path / "locked").chmod(0o700)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that refuses its arguments and has changed nothing."""
    before = listing(Path.cwd())
    status = COMMANDS[command].main(arguments)
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, ""), printed
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and len(line) < 1100
    assert listing(Path.cwd()) == before
    return line


ARTIFACTS = {
    "nowhere": "no such folder: nowhere",
    "file": "file is a file; name the folder that tvm-attn build wrote",
    "empty": "empty is no artifact",
    "other": "other is no artifact",
    "checkpoint": "checkpoint is a checkpoint: build it first: tvm-attn build --model checkpoint --target cpu",
    "": "the folder's name is empty",
    LONG_NAME: "",
    "a\nb": r"no such folder: 'a\nb'",
}
GENERATE = ["ARTIFACT", "--prompt-ids", "1"]
TAKES_ARTIFACT = {
    "generate": GENERATE,
    "verify": ["ARTIFACT"],
    "bench": ["ARTIFACT"],
    "compare": ["ARTIFACT", "--against", "torch"],
}


@pytest.mark.parametrize("command", TAKES_ARTIFACT)
@pytest.mark.parametrize("given", ARTIFACTS)
def test_what_is_no_artifact(command: str, given: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [given if word == "ARTIFACT" else word for word in TAKES_ARTIFACT[command]]
    assert ARTIFACTS[given] in refused(command, arguments, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("command", ["build", "tune"])
def test_a_checkpoint_that_may_not_be_read(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Permission denied" in refused(command, ["--target", "cpu", "--model", "locked"], capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("command", TAKES_ARTIFACT)
def test_a_folder_that_may_not_be_read(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["locked" if word == "ARTIFACT" else word for word in TAKES_ARTIFACT[command]]
    assert "Permission denied" in refused(command, arguments, capsys)


@pytest.mark.parametrize("command", TAKES_ARTIFACT)
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "unknown device 'tpu'"),
        ("", "unknown device ''"),
        ("cpu:1", "unknown device 'cpu:1'"),
        ("cuda:" + HUGE, "unknown device"),
        ("cuda", ",cuda"),
        ("vulkan:0", ",vulkan"),
    ],
)
def test_a_device_that_the_artifact_has_not(
    command: str, device: str, message: str, demo_artifact: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(demo_artifact) if word == "ARTIFACT" else word for word in TAKES_ARTIFACT[command]]
    assert message in refused(command, [*arguments, "--device", device], capsys)


NUMBERS = {
    "generate": (
        GENERATE,
        ("--max-new-tokens", "--top-k", "--threads"),
        ("--temperature", "--top-p", "--min-p", "--repetition-penalty"),
    ),
    "bench": (["ARTIFACT"], ("--prefill", "--decode", "--batch", "--threads", "--repeats"), ()),
    "compare": (["ARTIFACT", "--against", "torch"], ("--prefill", "--decode", "--batch", "--threads", "--repeats"), ()),
    "tune": (["--target", "cpu", "--model", "demo"], ("--trials",), ()),
}
BAD_NUMBERS = ["abc", "-1", "1.5.2", "0x10", HUGE, "nan", "1,x"]


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        (command, option, value)
        for command, (_, whole, real) in NUMBERS.items()
        for option in (*whole, *real)
        for value in BAD_NUMBERS
    ]
    + [
        ("generate", "--threads", ""),
        ("generate", "--top-k", ""),
        ("tune", "--trials", ""),
        ("bench", "--repeats", "0"),
    ]
    + [("generate", "--seed", value) for value in ("abc", "", "1.5")]
    + [("generate", "--stop-token-id", value) for value in ("abc", "", "1.5")],
)
def test_what_is_no_such_number(
    command: str, option: str, value: str, demo_artifact: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [str(demo_artifact) if word == "ARTIFACT" else word for word in NUMBERS[command][0]]
    line = refused(command, [*base, option, value], capsys)
    assert option in line or option[2:].replace("-", "_") in line


FILES = {
    "/nosuch/x": "no such folder: '/nosuch'",
    "nowhere/x": "no such folder: 'nowhere'",
    "empty": "'empty' is a folder",
    "file/x": "no such folder: 'file'",
    "": "the file's name is empty",
    "x" * 300: "'xxx",  # too long: a measurement of minutes would be lost
}


@pytest.mark.parametrize("command", ["bench", "compare"])
@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("given", FILES)
def test_files_that_cannot_be_written_are_refused_before_the_work(
    command: str, option: str, given: str, demo_artifact: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [str(demo_artifact) if word == "ARTIFACT" else word for word in TAKES_ARTIFACT[command]]
    assert f"argument {option}: {FILES[given]}" in refused(command, [*base, option, given], capsys)
    assert not Path("/nosuch").exists()


@pytest.mark.parametrize(("command", "option"), [("build", "--out"), ("tune", "--out"), ("tune", "--work")])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("file", "'file' is a file"),
        ("file/x", "is a file"),
        ("", "the folder's name is empty"),
        ("/proc/x", "cannot be written to"),
        (LONG_NAME, "cannot be used (File name too long)"),
    ],
)
def test_folders_that_cannot_be_made_are_refused_before_the_work(
    command: str, option: str, given: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if given == "/proc/x" and os.access("/proc", os.W_OK):
        pytest.skip("root may write everywhere")
    line = refused(command, ["--target", "cpu", "--model", "demo", option, given], capsys)
    assert f"argument {option}: " in line and message in line


def test_a_folder_that_is_no_artifact_is_not_replaced(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused("build", ["--target", "cpu", "--model", "demo", "--out", "other"], capsys)
    assert "other exists and is not an artifact; choose another --out" in line


@pytest.mark.parametrize("command", ["build", "tune", "kernels"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cpu-8086"], "unknown target 'cpu-8086'"),
        (["--target", ""], "unknown target ''"),
        (["--target", HUGE], "unknown target"),
        (["--target", "cpu", "--dtype", "float8"], "'float8'"),
        (["--target", "cpu", "--quant", ""], "argument --quant"),
        (["--target", "vulkan", "--dtype", "bfloat16"], "dtype 'bfloat16' is not available for vulkan-"),
        (["--target", "cpu", "--model", ""], "the model's name is empty"),
        (["--target", "cpu", "--model", "./nowhere"], "no such folder: ./nowhere"),
        (["--target", "cpu", "--model", "file"], "file is a file; pass the folder that holds it"),
        (["--target", "cpu", "--model", "/" + LONG_NAME], "File name too long"),
        (["--target", "cpu", "--model", LONG_NAME], "File name too long"),
        (["--target", "cpu", "--model", "empty"], "empty has no config.json"),
        (["--target", "cpu", "--xyzzy"], "unknown option '--xyzzy'; see"),
        (["--traget", "cpu"], "unknown option '--traget' (did you mean --target?); see"),
        (["--traget=cpu"], "unknown option '--traget' (did you mean --target?); see"),
        (["--" + HUGE], "unknown option '--999"),
        (["--target", "cpu", "more"], "unrecognized arguments: more"),
        (["--target"], "argument --target: expected one argument"),
    ],
)
def test_what_cannot_be_built(
    command: str, options: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(command, options, capsys)


@pytest.mark.parametrize("command", ["build", "kernels"])
def test_a_target_is_required(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: --target" in refused(command, [], capsys)


@pytest.mark.parametrize("given", ["", "1,,2", "1.5", "x", "1 2", HUGE])
def test_what_are_no_token_ids(given: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a list of integers such as 1,2,3" in refused("generate", ["x", "--prompt-ids", given], capsys)


@pytest.mark.parametrize("command", ["kernels", "tune"])
def test_only_a_build_takes_several_targets(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(command, ["--target", "cpu,cuda", "--model", "checkpoint"], capsys)
    assert line == "error: 'cpu,cuda' names several targets; name one of them"


def test_an_artifact_is_no_checkpoint(demo_artifact: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("build", "tune", "kernels"):
        line = refused(command, ["--target", "cpu", "--model", str(demo_artifact)], capsys)
        assert f"{demo_artifact} is an artifact, which is built already" in line


def test_standard_input_is_one_prompt(demo_artifact: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused("generate", [str(demo_artifact), "--prompt", "-", "--prompt", "-"], capsys)
    assert line == "error: two prompts are '-', and standard input can be read once"


def test_the_help_of_generate_names_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"--max-new-tokens N default: {GenerationOptions.max_new_tokens} --" in text


@pytest.mark.parametrize(
    ("given", "meant"), [([], None), (["--json"], "-"), (["--json", "-"], "-"), (["--json", "x.json"], Path("x.json"))]
)
def test_bench_prints_json_unless_a_file_is_named(
    given: list[str], meant: object, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(bench, "measure", lambda args: measured.append(args.json) or 0)
    assert bench.main(["dist/x", *given]) == 0
    assert measured == [meant]


def test_comparing_has_moved(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused("bench", ["dist/x", "--against", "torch,onnxruntime"], capsys)
    assert "python -m benchmarks.compare dist/x --against torch,onnxruntime" in line


# --- the entry point ---


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_help_page_lists_the_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, (_, description) in entry.COMMANDS.items():
        assert f"  {name:<12}{description}\n" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tvm-attn {tvm_attn.__version__}\n"


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_every_command_explains_itself_under_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([name, "--help"], ["help", name]):
        with pytest.raises(SystemExit) as ended:
            entry.main(words)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"usage: tvm-attn {name} ")
        assert ("--json" in shown) == (name != "serve")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["biuld"], "unknown command 'biuld'; did you mean build?"),
        (["zzz", "--help"], "unknown command 'zzz'; there are build, generate,"),
        (["--verison"], "unknown option '--verison'; did you mean --version?"),
        (["--frobnicate"], "unknown option '--frobnicate'; there are --help, --version"),
        ([HUGE], "unknown command"),
        ([""], "unknown command ''"),
        (["help", "zzz"], "unknown command 'zzz'"),
    ],
)
def test_a_command_that_there_is_not(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"error: {message}") and len(err) < 300


TYPOS = [
    [],
    ["--version"],
    ["biuld"],
    ["build", "--help"],
    ["build", "--target", "cpux"],
    ["build", "--target", "cpu", "--dtype", "float8"],
    ["build", "--target", "cpu", "--model", "./nowhere"],
    ["build", "--target", "cpu", "--model", "demo", "--out", "/dev/null"],
    ["generate", "nowhere", "--prompt", "x"],
    ["generate", "models/demo", "--prompt", "x"],
    ["generate", "nowhere", "--prompt", "x", "--top-k", "abc"],
    ["verify", "nowhere"],
    ["verify", "nowhere", "--device", "tpu"],
    ["bench", "nowhere"],
    ["bench", "nowhere", "--prefill", "abc"],
    ["bench", "nowhere", "--json", "/nosuch/x.json"],
    ["bench", "nowhere", "--against", "torch"],
    ["tune", "--target", "cpux"],
    ["tune", "--target", "cpu", "--model", "./nowhere"],
    ["tune", "--target", "cpu", "--trials", "0"],
    ["tune", "--target", "cuda-sm90", "--dtype", "float8"],
    ["kernels", "--target", "cpux"],
    ["kernels", "--target", "cpu", "--model", "./nowhere"],
    ["build", "--target", "vulkan", "--dtype", "bfloat16"],
    ["devices", "--frobnicate"],
]


SLOW = {"tvm", "tvm_ffi", "torch", "transformers", "rich", "matplotlib", "huggingface_hub"}
MISSPELT = [
    ["biuld"],
    *([name, "--frobnicate"] for name in entry.COMMANDS),
    *([name, "--target", "cpux"] for name in ("build", "kernels", "tune")),
    ["generate", "nowhere", "--prompt", "x", "--top-k", "abc"],
]


@pytest.mark.parametrize(
    ("typos", "slow"), [(TYPOS, SLOW), (MISSPELT, SLOW | {"numpy", "safetensors", "importlib.metadata"})]
)
def test_nothing_slow_is_imported_to_refuse_a_typo(typos: list[list[str]], slow: set[str]) -> None:
    """TVM takes seconds to import, PyTorch one, rich a tenth: none of them is needed for the answer.

    NumPy, which takes as long as the rest of Python's start, is not needed to know options and targets.
    """
    code = """
import sys
before = set(sys.modules)
from tvm_attn.__main__ import main
for words in %r:
    try:
        main(words)
    except SystemExit:
        pass
    slow = %r & set(sys.modules) - before
    assert not slow, (words, slow)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code % (typos, slow)], capture_output=True, text=True, timeout=300, cwd=root, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["tvm_attn", *(module for module, _ in entry.COMMANDS.values())])
def test_modules_run_as_commands(module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: tvm-attn ")


# --- progress ---


def test_progress_off_a_terminal_is_a_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.progress() as show:
        show("compiling", 0.1)
        show("compiling", 0.2, ": 3 of 7")
        show("checking")
    assert capsys.readouterr() == ("", "compiling\nchecking\n")
    with cli.progress(quiet=True) as show:
        show("compiling")
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_a_bar_that_goes_away() -> None:
    code = "from tvm_attn.cli import progress\nwith progress() as show: show('compiling [x]', 0.5, ': 3 of 7')"
    parent, child = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], stderr=child, timeout=300, check=False, env=environment)
    os.close(child)
    drawn = os.read(parent, 1 << 16).decode()
    os.close(parent)
    assert done.returncode == 0
    assert "compiling [x]: 3 of 7" in drawn and "50%" in drawn
    assert drawn.endswith("\x1b[2K")  # the line is cleared
