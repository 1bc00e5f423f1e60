"""Writes an artifact's folder completely or not at all, and replaces an older one in one step.

A build works in a hidden folder next to the artifact:

| place | holds |
|---|---|
| `.tvm-attn-build-XXXXXXXX/new` | what is being built; after the two are exchanged, the old artifact |
| `.tvm-attn-build-XXXXXXXX/old-N/NAME` | the old artifact, if the system cannot exchange two folders |

The building process locks that folder until it ends. The next build in the same place removes folders that no process
has locked. An old artifact is never removed before another one is in its place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from tvm_attn.errors import ArtifactError, one_line
from tvm_attn.jsonfile import CONFIG_BYTES, read_json, shorten_path
from tvm_attn.runtime.artifact import MANIFEST

_PREFIX = ".tvm-attn-build-"
# Other builds may put an artifact in the same place at the same time.
_TRIES = 100
# Left by a process that was killed while it wrote a manifest or restored parameters.
_UNFINISHED = (f".{MANIFEST}", ".params-")


@contextmanager
def artifact_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that replaces `out` if the block ends without an error.

    If `out` is a link, its destination is replaced. Missing parent folders are created.

    Raises:
        ArtifactError: `out` is something other than an artifact, cannot be replaced, or cannot be written.
    """
    made: list[Path] = []
    try:
        place = check_out(out)
        made += [folder for folder in place.parents if not folder.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(place)  # finds a name that is too long now rather than at the end
        _sweep(place.parent)
        with _work_folder(place.parent) as work:
            new = work / "new"
            new.mkdir()
            yield new
            _sync(new)
            _put(new, place, work)
            _sync_one(place.parent)  # before the old artifact is removed
    except OSError as error:
        where = f" ({shorten_path(error.filename)})" if error.filename is not None else ""
        reason = f"{error.strerror or one_line(error)}{where}"
        raise ArtifactError(f"cannot write {shorten_path(out)}: {reason}; choose another --out") from error
    finally:
        for folder in made:
            with suppress(OSError):  # only empty ones can be removed
                folder.rmdir()


def check_out(out: Path) -> Path:
    """The real path of `out`, after all checks that need not wait for the build.

    Raises:
        ArtifactError, OSError: no artifact can be written there.
    """
    try:
        place = Path(os.path.realpath(out))
    except ValueError as error:  # a zero byte
        raise ArtifactError(f"{shorten_path(out)} is not a path: {error}; choose another --out") from None
    if not os.path.lexists(place):
        return place
    _require_replaceable(place, out)
    if place in _mount_points():
        raise ArtifactError(f"{shorten_path(out)} is a mount point, which cannot be replaced; choose a folder in it")
    with suppress(FileNotFoundError):
        if Path.cwd().is_relative_to(place):
            raise ArtifactError(
                f"{shorten_path(out)} holds the current folder, which a build would replace; change to another, or "
                "choose another --out"
            )
    if not os.access(place, os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return place


def _mount_points() -> set[Path]:
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    # proc(5): spaces and the like are written as octal numbers.
    return {Path(os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1"))) for line in lines}


def _require_replaceable(place: Path, out: Path) -> None:
    """Refuses anything but an artifact, and an artifact with files that are not its own: they would be deleted."""
    shown = shorten_path(out)
    if place.is_dir() and not any(place.iterdir()):
        return
    manifest: Any = None
    with suppress(ArtifactError):
        manifest = read_json(place / MANIFEST, CONFIG_BYTES, ArtifactError)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict):
        raise ArtifactError(f"{shown} exists and is not an artifact; choose another --out, or remove it")
    foreign = [shorten_path(name) for name in islice(_foreign(place, {MANIFEST, *listed}), 4)]
    if foreign:
        names = ", ".join(foreign[:3]) + (" and more" if len(foreign) > 3 else "")
        raise ArtifactError(
            f"{shown} holds files that are not the artifact's ({names}); move them away, or choose another --out"
        )


def _foreign(place: Path, own: set[str]) -> Iterator[str]:
    """Names of everything in an artifact's folder except its `own` files."""
    own_folders = {"params", *(parent for path in own if (parent := os.path.dirname(path)))}
    for folder, folders, files in os.walk(place):
        for name in sorted(files) + sorted(folders):
            path = os.path.relpath(os.path.join(folder, name), place)
            if path not in own and path not in own_folders and not path.startswith(_UNFINISHED):
                yield path
        folders[:] = [name for name in folders if os.path.relpath(os.path.join(folder, name), place) in own_folders]


@contextmanager
def _work_folder(parent: Path) -> Iterator[Path]:
    while True:
        work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        # Until it is locked, another build may remove it as a leftover.
        if (descriptor := _locked(work)) is not None:
            break
    try:
        yield work
    finally:
        _discard(work)
        os.close(descriptor)


def _locked(work: Path) -> int | None:
    """Opens and locks a folder; None if it is gone or another process has locked it."""
    try:
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        _lock(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(work)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a file system without locks, on which nothing is swept either
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sweep(parent: Path) -> None:
    """Removes what killed builds left, and puts back an artifact that one of them had moved away."""
    for work in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _lock(descriptor)
                _discard(work)
            finally:
                os.close(descriptor)


def _discard(work: Path) -> None:
    for old in sorted(work.glob("old-*/*"), reverse=True):
        try:
            if not os.path.lexists(work.parent / old.name):
                old.rename(work.parent / old.name)
        except OSError:
            return  # the folder holds the only copy
    shutil.rmtree(work, ignore_errors=True)


def _put(new: Path, place: Path, work: Path) -> None:
    for number in range(_TRIES):
        try:
            new.rename(place)  # succeeds if nothing is there, or an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with suppress(FileNotFoundError):  # another build has just moved it away
            _require_replaceable(place, place)
            if _exchange(new, place):
                return
            old = work / f"old-{number:02}"
            old.mkdir()
            place.rename(old / place.name)
    raise ArtifactError(f"{shorten_path(place)} keeps being replaced by other builds; choose another --out")


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step with renameat2(2); False if the system or the file system cannot."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # an old C library
        return False
    return bool(renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def _sync(folder: Path) -> None:
    """Makes a folder's content survive a power failure, since it may replace a folder that would."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync_one(Path(place) / name)
        _sync_one(Path(place))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
            raise
    finally:
        os.close(descriptor)
