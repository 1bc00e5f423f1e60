"""Replacing an artifact: nothing is lost, readers never miss it, and what killed builds leave is removed."""

import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tvm_attn
from tvm_attn.compiler import replacement
from tvm_attn.compiler.artifact import write_manifest
from tvm_attn.compiler.replacement import artifact_folder
from tvm_attn.errors import ArtifactError
from tvm_attn.runtime.artifact import Artifact, open_artifact

WAYS = ["exchange", "two renames"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to replace a folder: in one step, and that of systems that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(replacement, "_exchange", lambda a, b: False)
    return str(request.param)


def make(out: Path, text: str) -> None:
    with artifact_folder(out) as folder:
        (folder / "file").write_text(text)
        (folder / "params").mkdir()
        (folder / "params" / "shard").write_text(text)
        write_manifest(folder, {})


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def text_of(out: Path) -> str:
    assert (out / "file").read_text() == (out / "params" / "shard").read_text()
    assert json.loads((out / "manifest.json").read_text())["files"].keys() == {"file", "params/shard"}
    return (out / "file").read_text()


def test_new_then_replaced(way: str, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for text in ("first", "second", "third"):
        make(out, text)
        assert text_of(out) == text
        assert list(out.parent.iterdir()) == [out]
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", "text")
    assert text_of(tmp_path / "out") == "text"


def test_readers_see_the_old_one_until_the_end(way: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    with artifact_folder(out) as folder:
        assert folder.stat().st_dev == out.stat().st_dev
        (folder / "manifest.json").write_text("{}")
        assert text_of(out) == "old"
    assert contents(out) == {"manifest.json": "{}"}


# --- what is refused, before minutes of work ---


@contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(ArtifactError, match=message) as caught:
        yield
    assert len(str(caught.value)) < 700
    assert len(str(caught.value).splitlines()) == 1


def never(out: Path) -> None:
    with artifact_folder(out):
        raise AssertionError("the build was started")


FOREIGN = ["thesis.txt", "notes/a", "params/extra", "params/deep/b", "empty/", ".hidden", "a\nb"]


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_not_the_artifacts(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    if name.endswith("/"):
        (out / name).mkdir()
    else:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text("years of work")
    before = contents(tmp_path)
    with refused(r"holds files that are not the artifact's \(.*\); move them away, or choose another --out"):
        never(out)
    assert contents(tmp_path) == before


def test_files_that_come_while_it_is_built(way: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    with refused("not the artifact's"), artifact_folder(out) as folder:
        (folder / "manifest.json").write_text("{}")
        (out / "thesis").write_text("years of work")
    assert text_of(out) == "old"
    assert (out / "thesis").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    "manifest", [None, "", "{", "[]", "{}", '{"name": "a web application"}', '{"files": []}', "[" * 100_000]
)
def test_a_folder_that_is_no_artifact(manifest: str | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis").write_text("years of work")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    before = contents(tmp_path)
    with refused("out exists and is not an artifact; choose another --out"):
        never(out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["a file", "a pipe", "below a file", "/", "a home", "zero", "a long name", "a loop"])
def test_places_where_nothing_can_be(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "a pipe":
        os.mkfifo(out)
    elif kind == "a loop":
        out.symlink_to(out)
    else:
        out.write_text("years of work")
    places = {
        "below a file": out / "x" / "y",
        "/": Path("/"),
        "a home": Path("/usr"),
        "zero": tmp_path / "a\0b",
        "a long name": tmp_path / "new" / ("n" * 256),
    }
    with refused(r"choose another --out|remove it"):
        never(places.get(kind, out))
    assert list(tmp_path.iterdir()) == [out]


def test_long_names_that_are_possible(way: str, tmp_path: Path) -> None:
    out = tmp_path / ("d" * 200) / ("n" * 255)
    for text in ("first", "second"):
        make(out, text)
        assert text_of(out) == text


def test_a_path_of_kilobytes(tmp_path: Path) -> None:
    with refused("cannot write .*: File name too long"):
        never(tmp_path / ("long/" * 10_000))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "params"])
def test_the_current_folder(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "out", "old")
    monkeypatch.chdir(tmp_path / "out" / below)
    for place in (Path("."), tmp_path / "out", Path("..")) if not below else (Path(".."),):
        with refused("current folder|not an artifact"):
            never(place)
    assert text_of(tmp_path / "out") == "old"
    make(tmp_path / "beside", "new")


def test_a_link_is_followed(way: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "large disk" / "out")
    for text in ("first", "second"):
        make(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert text_of(tmp_path / "large disk" / "out") == text


def test_mount_points_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a b\\ä"
    place.mkdir()
    escaped = str(place).replace("\\", "\\134").replace(" ", "\\040")
    line = f"36 35 98:0 /root {escaped} rw,noatime shared:1 - ext4 /dev/sda1 rw\n".encode()
    monkeypatch.setattr(Path, "read_bytes", lambda self: line)
    assert replacement._mount_points() == {place}
    with refused("is a mount point, which cannot be replaced; choose a folder in it"):
        never(place)


# --- permissions, space ---


@contextmanager
def as_nobody(place: str) -> Iterator[None]:
    """For root, whom no permission stops: another user inside, who owns the temporary folder `place`."""
    if os.geteuid() != 0:
        yield
        return
    for folder, _, files in os.walk(place):
        for name in (".", *files):
            os.chown(os.path.join(folder, name), 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("forbidden", [".", "out", "above"])
def test_folders_without_permission(forbidden: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        make(out, "old")
        (Path(place) / "above").mkdir()
        target = Path(place) / "above" / "out" if forbidden == "above" else out
        with as_nobody(place):
            (Path(place) / forbidden).chmod(0o500)
            with refused("cannot write .*Permission denied.*; choose another --out"):
                never(target)
            (Path(place) / forbidden).chmod(0o700)
        assert text_of(out) == "old"


LIMITED = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_replacement import make
from tvm_attn.errors import ArtifactError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    make(Path(sys.argv[1]), "new" * 1000)
    print("written")
except ArtifactError as error:
    print(error)
"""


def run(code: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_writes_that_fail_anywhere(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    for limit in (0, 100, 2999):
        assert f"cannot write {out}: File too large" in run(LIMITED, out, str(limit), Path(__file__).parent)
        assert text_of(out) == "old"
        assert list(tmp_path.iterdir()) == [out]
    assert run(LIMITED, out, "100000", Path(__file__).parent) == "written\n"
    assert text_of(out) == "new" * 1000


@pytest.mark.parametrize("name", ["fsync", "mkdir"])
def test_a_system_call_that_fails(name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    make(out, "old")
    real = getattr(os, name)
    for number in range(20):
        calls = iter(range(100))

        def failing(*arguments: Any, number: int = number, calls: Iterator[int] = calls, **named: Any) -> Any:
            if next(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **named)

        with monkeypatch.context() as patch, pytest.MonkeyPatch.context():
            patch.setattr(os, name, failing)
            try:
                make(out, f"new {number}")
                break
            except ArtifactError as error:
                assert "No space left on device; choose another --out" in str(error)
        # The last call of fsync comes after the exchange.
        assert text_of(out) in ("old", f"new {number}")
        assert list(tmp_path.iterdir()) == [out]
    assert 2 < number < 20 or name == "mkdir"


# --- interrupted and killed builds ---


@pytest.mark.parametrize("exception", [KeyboardInterrupt, MemoryError, OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("moment", range(3))
def test_interrupted_replacement(moment: int, exception: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, between and after the two renames of systems without an exchange."""
    out = tmp_path / "out"
    make(out, "old")
    monkeypatch.setattr(replacement, "_exchange", lambda a, b: False)
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append((self, target))
        if target == out and self.name == "new" and len(calls) == 1:
            return rename(self, target)  # the first try, which tells that something is there
        if len(calls) == 2 + moment:
            raise exception
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises((ArtifactError, KeyboardInterrupt, MemoryError)):
        make(out, "new")
        if moment == 2:
            raise KeyboardInterrupt
    monkeypatch.undo()
    assert text_of(out) == ("new" if moment == 2 else "old")
    assert list(tmp_path.iterdir()) == [out]


def test_the_only_copy_stays_where_it_cannot_be_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    make(out, "old")
    monkeypatch.setattr(replacement, "_exchange", lambda a, b: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == out and not out.exists():
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ArtifactError, match="broken"):
        make(out, "new")
    monkeypatch.undo()
    assert not out.exists()
    assert [path.read_text() for path in tmp_path.rglob("old-*/out/file")] == ["old"]
    make(tmp_path / "another", "x")  # the next build beside it finds it and puts it back
    assert text_of(out) == "old"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "another", out]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_replacement
from test_replacement import replacement
moment = sys.argv[3]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "before":
    replacement._put = die
elif moment == "after":
    replacement._discard = die
elif moment == "between":
    replacement._exchange = lambda a, b: False
    rename, calls = Path.rename, []
    def killing(self, target):
        if calls:
            die()
        result = rename(self, target)
        calls.append(target)
        return result
    Path.rename = killing
test_replacement.make(Path(sys.argv[1]), "new")
"""


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_what_a_killed_build_leaves(moment: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, "old")
    command = [sys.executable, "-c", KILLED, str(out), str(Path(__file__).parent), moment]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".tvm-attn-build-*"))) == 1
    assert out.exists() == (moment != "between")
    make(tmp_path / "another", "x")
    assert text_of(out) == ("new" if moment == "after" else "old")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "another", out]


def test_a_living_neighbour_is_left_alone(tmp_path: Path) -> None:
    with artifact_folder(tmp_path / "a") as folder:
        (folder / "manifest.json").write_text("{}")
        run(
            "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
            "from test_replacement import make; make(Path(sys.argv[1]), 'b')",
            tmp_path / "b",
            Path(__file__).parent,
        )
        make(tmp_path / "c", "c")
        assert folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_what_looks_like_left_over_and_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("years of work")
    (tmp_path / ".tvm-attn-build-link").symlink_to(tmp_path / "precious")
    (tmp_path / ".tvm-attn-build-file").write_text("x")
    make(tmp_path / "out", "text")
    assert (tmp_path / "precious" / "file").read_text() == "years of work"


def test_a_file_system_without_locks(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds work; nothing is swept, as nobody can tell who is alive."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / ".tvm-attn-build-12345678").mkdir()
    for text in ("first", "second"):
        make(tmp_path / "out", text)
        assert text_of(tmp_path / "out") == text
    assert (tmp_path / ".tvm-attn-build-12345678").exists()


def test_an_old_c_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    for text in ("first", "second"):
        make(tmp_path / "out", text)
        assert text_of(tmp_path / "out") == text


def test_a_failed_build_leaves_no_folders(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), artifact_folder(tmp_path / "a" / "b" / "c") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# --- many at once ---

WRITER = """
import os, shutil, sys
from pathlib import Path
from tvm_attn.compiler.artifact import write_manifest
from tvm_attn.compiler.replacement import artifact_folder
import json
source, out, name, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
for number in range(count):
    with artifact_folder(out) as folder:
        shutil.copytree(source, folder, copy_function=os.link, dirs_exist_ok=True)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.json").write_text(f"{name} {number}")
        body = json.loads((source / "manifest.json").read_bytes())
        (folder / "manifest.json").unlink()
        write_manifest(folder, body | {"date": f"{name} {number}"})
"""


def test_writers_readers_and_kills(demo_artifact: Path, tmp_path: Path) -> None:
    """Readers find a whole artifact in every look, whoever writes or dies."""
    out = tmp_path / "out"
    shutil.copytree(demo_artifact, out)
    before = Artifact(out)
    writers = {
        name: subprocess.Popen([sys.executable, "-c", WRITER, demo_artifact, out, name, "1000000"])
        for name in ("a", "b", "c", "killed")
    }
    seen: set[str] = set()

    def look(artifact: Artifact) -> None:
        text, date = artifact.tokenizer_json(), artifact.manifest["date"]
        assert text == date or date == before.manifest["date"]
        for name in artifact.manifest["files"]:
            artifact.read(name)
        seen.add(date.partition(" ")[0])

    try:
        looks = 0
        while looks < 100 or not {"a", "b", "c", "killed"} <= seen:
            assert out.is_dir() and (out / "manifest.json").is_file()
            open_artifact(out, look)
            looks += 1
            if looks % 10 == 0:
                writers["killed"].kill()
                writers["killed"].wait()
                name = "killed" if looks % 20 else "again"
                command = [sys.executable, "-c", WRITER, demo_artifact, out, name, "1000000"]
                writers["killed"] = subprocess.Popen(command)
            assert all(writers[name].poll() is None for name in ("a", "b", "c"))
    finally:
        for process in writers.values():
            process.kill()
            process.wait()
    make(tmp_path / "last", "x")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "last", out]
    open_artifact(out, look)


def test_what_was_opened_is_read_to_the_end(way: str, demo_artifact: Path, tmp_path: Path) -> None:
    """All files come from the folder whose manifest was read, or, where that is gone, from the new one."""
    out = tmp_path / "out"
    shutil.copytree(demo_artifact, out)
    with artifact_folder(out) as folder:
        shutil.copytree(demo_artifact, folder, dirs_exist_ok=True)
        (folder / "tokenizer.json").write_text("new")
        write_manifest(folder, json.loads((folder / "manifest.json").read_bytes()))
        opened = Artifact(out)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        opened.tokenizer_json()
    tries = []

    def use(artifact: Artifact) -> str | None:
        tries.append(artifact)
        return (opened if len(tries) == 1 else artifact).tokenizer_json()

    with pytest.raises(ArtifactError):
        open_artifact(out, use)  # nothing was replaced in between
    tries.clear()

    def use_and_replace(artifact: Artifact) -> str | None:
        if not tries:
            make(out, "x")
            shutil.rmtree(out)
            shutil.copytree(demo_artifact, out)
        return use(artifact)

    assert open_artifact(out, use_and_replace) == (demo_artifact / "tokenizer.json").read_text()
    assert len(tries) == 2
    tvm_attn.load(out)
