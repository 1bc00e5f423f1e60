"""Reading `targets/`: every file that comes along is right, and what is wrong in one is named, whoever asks."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvm_attn import _resources, build, inventory, list_kernels, targets
from tvm_attn._resources import resource_dir
from tvm_attn.compiler.devices import backend_for
from tvm_attn.errors import TargetError, TvmAttnError

NAMES = targets.names()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Takes the place of `targets/`, with all files that come along."""
    place = tmp_path / "targets"
    place.mkdir()
    for name in NAMES:
        (place / f"{name}.toml").write_bytes((resource_dir("targets") / f"{name}.toml").read_bytes())
    monkeypatch.setattr(_resources, "resource_dir", lambda name: tmp_path / name)
    return place


def changed(name: str, key: str, value: str | None) -> str:
    """A file with another value for a key such as "tile.rows", as TOML writes it; None leaves the key out."""
    text = (resource_dir("targets") / f"{name}.toml").read_text()
    table, _, last = key.rpartition(".")
    start = text.index(f"[{table}]") if table else 0
    line = re.compile(rf"^{last} = .*\n", re.MULTILINE)
    found = line.search(text, start)
    new = "" if value is None else f"{last} = {value}\n"
    if found is None:
        at = text.index("\n", start) + 1 if table else 0
        return text[:at] + new + text[at:]
    return text[: found.start()] + new + text[found.end() :]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_read(name: str) -> None:
    target = targets.read(name)
    assert target.name == name
    backend_for(target).tvm_target(target)


CPU, GPU, CUDA = "cpu-x86-64-v4", "vulkan-matrix", "cuda-sm80"
WRONG = [
    *((CPU, "device", value, "device is .*; give one of cpu, cuda, vulkan") for value in ('"tpu"', "3", "[]", '""')),
    (CPU, "device", None, "lacks the key 'device'"),
    (CPU, "device", '"cuda"', "lacks the key 'gpu'"),
    *((CPU, "description", value, "description is .*; give text on one line") for value in ("3", '""', '"a\\nb"')),
    *(
        (CPU, "dtypes", value, "dtypes is .*; give a list of float32, float16, bfloat16")
        for value in ('"float32"', "[]", '["float64"]', "[32]", "3", '[["float32"]]')
    ),
    *((CPU, "tile.rows", v, "tile.rows is .*; give an integer from 1 to 64") for v in ('"8"', "0", "-8", "8.0")),
    *((CPU, "tile.rows", v, "tile.rows is") for v in ("true", "65", "1000000000", "nan", "[8]", "1979-05-27")),
    *((CPU, "tile.columns", v, "tile.columns is .*; give a power of two") for v in ("12", "0", "-32", "2048", '"32"')),
    (CPU, "tile.columns", "8", "tile.columns is 8; give a multiple of vector.lanes, 16"),
    *((CPU, "vector.lanes", value, "vector.lanes is .*; give a power of two") for value in ("12", "0", "128", "4.0")),
    *((CPU, "cache.l2_bytes", value, "cache.l2_bytes is") for value in ("0", "-1", '"1 MB"', "1e6", "9" * 30)),
    *((CPU, "features", value, "features is .*; give a list") for value in ('"avx"', "3", "[3]", '[""]', '["a b"]')),
    (CPU, "detect.architecture", "64", "detect.architecture is 64"),
    (CPU, "detect.processor", "4", "detect.processor is 4"),
    *((CPU, "detect.rank", value, "detect.rank is") for value in ('"high"', "-1", "1.5", "inf")),
    (CPU, "tile.color", '"red"', "the key 'tile.color' is unknown"),
    (CPU, "color", '"red"', "the key 'color' is unknown"),
    (CPU, "cuda", '"red"', "the key 'cuda' is unknown"),
    (CPU, "tvm.kind", '"cuda"', "tvm.kind is 'cuda'; give 'llvm'"),
    (CPU, "tvm.kind", None, "tvm.kind is None; give 'llvm'"),
    (CPU, "tvm.mtriple", '"aarch64-linux-gnu"', "tvm.mtriple is .*; give one for detect.architecture, such as x86_64-"),
    *((CPU, "based_on", value, "based_on is .*; give a target's name") for value in ("3", '""', '"../x"', "[]")),
    ("cpu-znver4", "peak.float32_gflops", '"225"', "peak.float32_gflops is '225'; give a positive number"),
    *(("cpu-znver4", "peak.memory_gbytes", value, "give a positive number") for value in ("0", "-1", "nan", "inf")),
    ("cpu-znver4", "peak.memory_gbytes", None, "lacks the key 'peak.memory_gbytes'"),
    *((GPU, "gpu.matrix", v, "gpu.matrix is .*; give three sizes") for v in ("[16, 16]", "16", "[0, 1, 1]", '["a"]')),
    *((GPU, "gpu.max_threads", value, "gpu.max_threads is") for value in ("100", "16", "2048", "0", '"256"')),
    *((GPU, "gpu.shared_bytes", value, "gpu.shared_bytes is") for value in ("0", "-1", "1.5", "9999999999")),
    *((GPU, "gpu.vector_bytes", value, "gpu.vector_bytes is") for value in ("0", "2", "12", "32")),
    *((GPU, "gpu.subgroup", value, "gpu.subgroup is") for value in ("0", "12", "256", '"warp"')),
    (GPU, "gpu.subgroup", None, "gpu.matrix needs gpu.subgroup"),
    (GPU, "gpu.subgroup", "16", "tvm.thread_warp_size is 32; give the value of gpu.subgroup"),
    *(
        (CUDA, "cuda.architectures", value, "give a list such as")
        for value in ("[]", '"sm_80"', "[80]", '["8.0"]', '["sm_80\\n"]', '["gfx90a"]')
    ),
    *((CUDA, "cuda.ptx", value, "give a virtual architecture") for value in ("80", '"sm_80"', '""', "[]")),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), WRONG, ids=lambda item: repr(item)[:24])
def test_a_wrong_value_is_named(name: str, key: str, value: str | None, message: str, folder: Path) -> None:
    (folder / "mine.toml").write_text(changed(name, key, value))
    with pytest.raises(TargetError, match=rf"targets/mine\.toml: .*{message}.*targets/README\.md lists") as caught:
        targets.read("mine")
    assert len(str(caught.value)) < 600
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("table", ["tvm", "tile", "detect", "vector", "cache"])
def test_tables_must_be_tables(table: str, folder: Path) -> None:
    text = (folder / f"{CPU}.toml").read_text()
    beginning = text.index(f"[{table}]")
    end = text.find("\n[", beginning)
    without = text[:beginning] + (text[end + 1 :] if end > 0 else "")
    for value, message in (("3", f"{table} is 3; give a table"), ("[]", f"{table} is \\[\\]"), (None, "lacks the key")):
        (folder / "mine.toml").write_text(without if value is None else f"{table} = {value}\n{without}")
        with pytest.raises(TargetError, match=message):
            targets.read("mine")


@pytest.mark.parametrize(
    "content",
    [b"device = ", b"\xff\xfe", b"a = " + b"[" * 100_000, b"a = " + b"9" * 10_000, b"a = 1\na = 2", b"x" * 10**6, b""],
    ids=lambda content: repr(content[:12]),
)
def test_files_that_are_no_toml(content: bytes, folder: Path) -> None:
    (folder / "mine.toml").write_bytes(content)
    with pytest.raises(TargetError, match=r"targets/mine\.toml") as caught:
        targets.read("mine")
    assert len(str(caught.value)) < 600
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a dangling link", "100 GiB"])
def test_a_file_that_nobody_asked_for(kind: str, folder: Path) -> None:
    """It is left out with a warning that names it, and refused where it is asked for."""
    path = folder / "broken.toml"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"")
        os.truncate(path, 100 << 30)
    with pytest.warns(UserWarning, match=r"a target is left out: .*broken\.toml"):
        assert [target.name for target in targets.read_all()] == NAMES
    with pytest.warns(UserWarning, match=r"broken\.toml"):
        targets.detect_cpu()
    with pytest.warns(UserWarning, match=r"broken\.toml"):
        fits = list(inventory._fits([], {}))
    assert {fit.target for fit in fits} == set(NAMES)
    assert targets.read(CPU).name == CPU
    with pytest.raises(TargetError, match=r"broken\.toml"):
        targets.read("broken")


CODE = """
import sys
from dataclasses import replace
from pathlib import Path
from tvm_attn import _resources, cli, targets
_resources.resource_dir = lambda name: Path(sys.argv[1])
sys.exit(cli.run(lambda: print(targets.detect_cpu().name, targets.detect_cpu().name) or 0))
"""


def test_a_command_warns_in_one_line(folder: Path) -> None:
    (folder / "broken.toml").write_text("device = 3")
    done = subprocess.run([sys.executable, "-c", CODE, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: a target is left out: ") and "broken.toml: " in line


@pytest.mark.parametrize("change", ["mcpu = 5", 'nonsense = "x"', 'mattr = "+avx"', "kind = []"])
def test_what_tvm_refuses(change: str, folder: Path) -> None:
    key, _, value = change.partition(" = ")
    (folder / "mine.toml").write_text(changed(CPU, f"tvm.{key}", value))
    with pytest.raises(TargetError, match=r"mine\.toml") as caught:
        backend_for(targets.read("mine")).tvm_target(targets.read("mine"))
    assert len(str(caught.value).splitlines()) == 1


# --- the user's files ---


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of targets."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    place = tmp_path / "data" / "tvm-attn" / "targets"
    place.mkdir(parents=True)
    assert targets.user_folder() == place
    return place


def test_the_users_files_come_first(user: Path) -> None:
    (user / "mine.toml").write_text(changed(CPU, "tile.rows", "4"))
    (user / f"{CPU}.toml").write_text(changed(CPU, "tile.rows", "16"))
    assert targets.names() == sorted([*NAMES, "mine"])
    assert targets.resolve("mine").tile_rows == 4
    assert targets.read(CPU).tile_rows == 16
    assert targets.read(CPU).file == user / f"{CPU}.toml"
    assert {target.name: target.tile_rows for target in targets.read_all()}[CPU] == 16
    assert not targets.related(targets.read("mine"))  # no other has this tile
    fits = inventory.take_inventory().fits
    assert {fit.file for fit in fits if fit.target == "mine"} == {str(user / "mine.toml")}


def test_a_bad_file_of_the_user_is_named(user: Path) -> None:
    (user / "cpu-znver4.toml").write_text('device = "cpu"')
    (user / "two words.toml").write_text(changed(CPU, "tile.rows", "4"))
    (user / "not.utf8.toml").write_bytes(b"\xff")
    (user / "folder.toml").mkdir()
    with pytest.warns(UserWarning, match="left out") as caught:
        known = {target.name: target for target in targets.read_all()}
    assert len(caught) == 4
    assert sorted(known) == NAMES
    assert known["cpu-znver4"].file == resource_dir("targets") / "cpu-znver4.toml"
    with pytest.raises(TargetError, match=r"tvm-attn/targets/cpu-znver4\.toml: it lacks the key"):
        targets.resolve("cpu-znver4")


def test_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tvm-attn").mkdir()
    (tmp_path / "tvm-attn" / "targets").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="no targets are read from .*: Not a directory"):
        assert targets.names() == NAMES


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: Path("~/.local/share") / name)
    assert targets.names() == NAMES
    with pytest.raises(TvmAttnError, match="set XDG_DATA_HOME"):
        targets.user_folder()


def test_a_file_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(changed(CPU, "tile.rows", "4"))
    assert targets.resolve(str(path)).name == "my-board"
    assert [target.name for target in targets.check_names(f"{path}, {CPU}")] == ["my-board", CPU]
    for text, message in (
        ("nowhere/x.toml", "nowhere/x.toml is missing"),
        (f"{tmp_path}/.toml", "name the file with letters|is missing"),
        ("a\0b.toml", "cannot be read"),
        ("n" * 300 + ".toml", "File name too long"),
    ):
        with pytest.raises(TargetError, match=message) as caught:
            targets.resolve(text)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_written_file_is_the_same_target(name: str, tmp_path: Path) -> None:
    target = replace(targets.read(name), description='"quoted" \\ ü \t', based_on="cpu-x86-64")
    path = tmp_path / "new" / f"{name}.toml"
    assert targets.write(target, path) == targets.resolve(str(path)) == target
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    target = targets.read(CPU)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x" / "a.toml", tmp_path / "file" / "a.toml", tmp_path / ("n" * 300 + ".toml")):
        with pytest.raises(TargetError, match=r"cannot be (written|made)|name the file"):
            targets.write(target, path)
    with pytest.raises(TargetError, match=r"tile.rows is 65; give an integer"):
        targets.write(replace(target, tile_rows=65), tmp_path / "a.toml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mcpu", '"znver9"', r"tvm.mcpu is 'znver9'; LLVM has no such processor; the nearest: znver5, znver4, znver3"),
        ("mcpu", '"native"', r"tvm.mcpu is 'native'; LLVM has no such processor"),
        (
            "mattr",
            '["+avx512nonsense"]',
            r"tvm.mattr has '\+avx512nonsense'; LLVM has no such feature; the nearest: avx",
        ),
        ("mattr", '["avx2"]', r"tvm.mattr has 'avx2'"),
        ("mattr", '["-retpoline-external-thunk", "+avx2"]', None),
    ],
)
def test_what_llvm_does_not_know(
    key: str, value: str, message: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(changed(CPU, f"tvm.{key}", value))
    target = targets.resolve(str(path))
    if message is None:
        backend_for(target).tvm_target(target)
    else:
        for command in (build.main, list_kernels.main):
            assert command(["--model", "demo", "--target", str(path)]) == 2
            (line,) = capfd.readouterr().err.splitlines()
            assert re.match(rf"error: {re.escape(str(path))}: {message}", line)
    assert capfd.readouterr() == ("", "")


def test_an_architecture_that_llvm_does_not_know(tmp_path: Path) -> None:
    """Asking LLVM for its processors would crash."""
    path = tmp_path / "mine.toml"
    path.write_text(changed(CPU, "tvm.mtriple", '"z80-linux-gnu"').replace('"x86_64"', '"z80"'))
    target = targets.resolve(str(path))
    with pytest.raises(TargetError, match=r"tvm\.mtriple is 'z80-linux-gnu'; LLVM has no such architecture"):
        backend_for(target).tvm_target(target)


def test_the_nearest_names() -> None:
    with pytest.raises(TargetError, match=r"unknown target 'cpu-znver5'; known .*; did you mean cpu-znver4"):
        targets.resolve("cpu-znver5")


def test_unknown_names_are_not_echoed() -> None:
    for name in ("x" * 100_000, "../cpu", "a\nb", "", "a\0b"):
        with pytest.raises(TargetError, match="unknown target") as caught:
            targets.read(name)
        assert len(str(caught.value)) < 600
        assert len(str(caught.value).splitlines()) == 1


VALUES = st.sampled_from(["3", "-1", "0", "nan", "true", '"x"', '""', "[]", "[[]]", "{a = 1}", "1979-05-27", "1e400"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([CPU, GPU, CUDA]), place=st.floats(0, 1, exclude_max=True), value=VALUES)
def test_any_value_anywhere(folder: Path, name: str, place: float, value: str) -> None:
    """A value is replaced: the file is read, or refused in one line."""
    lines = (resource_dir("targets") / f"{name}.toml").read_text().splitlines()
    entries = [number for number, line in enumerate(lines) if " = " in line]
    number = entries[int(place * len(entries))]
    lines[number] = lines[number].partition(" = ")[0] + f" = {value}"
    (folder / "mine.toml").write_text("\n".join(lines))
    try:
        target = targets.read("mine")
    except TargetError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert target.tile_rows > 0
        try:
            backend_for(target).tvm_target(target)
        except TargetError as error:
            assert len(str(error).splitlines()) == 1
