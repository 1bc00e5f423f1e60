"""Completes the prompts of a file of JSON lines into another: `tvm-attn generate --prompts IN --out OUT`.

A line of the input is an object: "prompt" is text or a list of token ids, "id" is copied into the result, and every
other name is an option of `GenerationOptions` that holds for this line. Empty lines are skipped.

A line of the output is the result of one line of the input, in the order in which they end:

| name | value |
|---|---|
| index | number of the input line, from 0 |
| id | of the input line, if it has one |
| text, token_ids, finish_reason | of the `Completion`; with n > 1 they are in the objects of "completions" |
| prompt_tokens, completion_tokens | how many |
| key | digest of the input line, the options and the artifact |

Results are appended as they come, each in one piece. The same call goes on after an interruption: it drops an
unfinished last line, and skips what is there. A key that differs shows that the input, the options or the artifact has
changed. Lines that cannot be completed are reported and leave no result. Both files are read as streams; of a finished
line, 16 bytes are kept.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from tvm_attn.cli import Show
from tvm_attn.errors import GenerationError, TvmAttnError, UsageError, one_line, shorten
from tvm_attn.generate import completions_object
from tvm_attn.jsonfile import opened, parse_json, shorten_path
from tvm_attn.runtime.decoding import GenerationOptions

if TYPE_CHECKING:
    from tvm_attn.runtime.model import Model
    from tvm_attn.runtime.request import Request

_LONGEST_LINE = 16 << 20  # bytes, of the input; a context of the largest models is below 1 MB
_LONGEST_RESULT = 1 << 30
_REPORTED = 20  # messages; the rest is counted


@dataclass
class Summary:
    """What a call has done.

    Attributes:
        done: lines completed by this call.
        skipped: lines that an earlier call has completed.
        failed: lines that cannot be completed.
        completion_tokens: tokens generated.
        seconds: of this call.
    """

    done: int = 0
    skipped: int = 0
    failed: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated a second."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Line:
    index: int
    content: bytes | None  # None if it is too long
    key: int


def complete_file(
    model: Model, source: Path, target: Path, options: dict[str, Any], identity: str, show: Show
) -> Summary:
    """Completes every line of `source` that has no result in `target`, and appends the results.

    Args:
        model: completes as many lines at a time as it has slots.
        source: the input, a regular file.
        target: the output. One that is no regular file, such as a pipe, is written from the start.
        options: of `GenerationOptions`, for lines that do not have their own. Sequence k of line i samples with the
            seed as sequence i * n + k of a request; with a seed in the line, as sequence k.
        identity: of the model; part of every key.
        show: told how much of the input is read.

    Raises:
        GenerationError: a file cannot be used, or the results in `target` do not belong to this call.
        UsageError: both are one file.
    """
    if source.exists() and target.exists() and os.path.samefile(source, target):
        raise UsageError(f"--prompts and --out are one file, {shorten_path(target)}; name another with --out")
    given = asdict(GenerationOptions(**options))
    del given["speculate"]  # changes no result
    settings = json.dumps([identity, given], default=sorted, sort_keys=True)
    start = hashlib.blake2b(settings.encode(), digest_size=8)
    with ExitStack() as stack:
        file = stack.enter_context(opened(source, GenerationError))
        results = stack.enter_context(closing(_Results(target, show)))
        size = os.fstat(file.fileno()).st_size

        def progress(summary: Summary) -> None:
            share = min(file.tell() / size, 1.0) if size else 1.0
            detail = f", {summary.done} lines, {summary.tokens_per_second:.0f} tokens/s"
            show(f"completing {shorten_path(source)}", share, detail)

        return asyncio.run(_Job(model, options, results, progress).run(_lines(file, start)))


class _Job:
    """One call of `complete_file`."""

    def __init__(
        self, model: Model, options: dict[str, Any], results: _Results, progress: Callable[[Summary], None]
    ) -> None:
        self.model, self.options, self.results, self.progress = model, options, results, progress
        self.summary = Summary()
        self.begin = perf_counter()

    async def run(self, lines: Iterator[_Line]) -> Summary:
        """Completes the lines that have no result."""
        most = 2 * self.model.engine.max_batch  # so that one waits for each slot
        running: set[asyncio.Task[None]] = set()
        self.progress(self.summary)
        for line in lines:
            if self.results.has(line):
                self.summary.skipped += 1
                continue
            try:
                given = _parsed(line)
                requests = self._submit(given, line.index)
            except TvmAttnError as error:
                self._report(line, error)
                continue
            running.add(asyncio.create_task(self._complete(line, given, requests)))
            if len(running) >= most:
                running = await self._some(running)
        while running:
            running = await self._some(running)
        if self.summary.failed > _REPORTED:
            print(f"and {self.summary.failed - _REPORTED} other lines", file=sys.stderr)
        return self.summary

    async def _some(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Waits for one to end, and gives those that have not."""
        done, rest = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        self.summary.seconds = perf_counter() - self.begin
        self.progress(self.summary)
        return rest

    def _submit(self, given: dict[str, Any], index: int) -> list[Request]:
        """Starts the sequences of a line.

        Raises:
            TvmAttnError: something in the line is wrong.
        """
        prompt = given["prompt"]
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and set(map(type, prompt)) == {int}):
            raise GenerationError(f'"prompt" is {shorten(prompt)}; it must be text or a list of token ids')
        own = {name: value for name, value in given.items() if name not in ("prompt", "id")}
        known = [field.name for field in fields(GenerationOptions)]
        if unknown := sorted(own.keys() - set(known)):
            raise GenerationError(f"{shorten(unknown[0])} is unknown; there are prompt, id, {', '.join(known)}")
        options = self.options | own
        count = GenerationOptions(**options).n
        first = index * count if own.get("seed") is None else 0
        one = GenerationOptions(**options | {"n": 1})
        submit = self.model.scheduler.submit
        return [submit(prompt, one, index=first + number) for number in range(count)]

    async def _complete(self, line: _Line, given: dict[str, Any], requests: list[Request]) -> None:
        """Waits for the sequences of a line and writes its result."""
        try:
            found = [await request.wait() for request in requests]
        except TvmAttnError as error:
            self._report(line, error)
            return
        tokens = sum(len(completion.token_ids) for completion in found)
        result = {"index": line.index} | ({"id": given["id"]} if "id" in given else {})
        result |= completions_object(found)
        counts = {"prompt_tokens": len(requests[0].prompt_ids), "completion_tokens": tokens}
        self.results.append(result | counts | {"key": f"{line.key:016x}"})
        self.summary.done += 1
        self.summary.completion_tokens += tokens

    def _report(self, line: _Line, error: TvmAttnError) -> None:
        self.summary.failed += 1
        if self.summary.failed <= _REPORTED:
            print(f"line {line.index + 1}: {one_line(error, 400)}", file=sys.stderr)


def _lines(file: BinaryIO, start: Any) -> Iterator[_Line]:
    """The lines that are not empty; `start` is the state of their keys' hash."""
    index = 0
    while content := file.readline(_LONGEST_LINE):
        state = start.copy()
        state.update(content.rstrip(b"\r\n"))
        is_long = False
        while not content.endswith(b"\n") and (more := file.readline(_LONGEST_LINE)):
            state.update(more)
            is_long, content = True, more
        if is_long or content.strip():
            yield _Line(index, None if is_long else content, int.from_bytes(state.digest(), "big"))
        index += 1


def _parsed(line: _Line) -> dict[str, Any]:
    """Raises GenerationError if the line is no object with a prompt."""
    if line.content is None:
        raise GenerationError(f"it is longer than {_LONGEST_LINE >> 20} MiB")
    try:
        text = line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GenerationError(f"it is not UTF-8 text: {one_line(error)}") from None
    given = parse_json(text.strip(), "it", GenerationError)
    if not isinstance(given, dict) or "prompt" not in given:
        raise GenerationError(f'it is {shorten(given)}; it must be an object with a "prompt"')
    return given


class _Results:
    """The output: which lines it has, and a place to append.

    Raises GenerationError if it cannot be written, is being written by another process, or holds something else.
    """

    def __init__(self, path: Path, show: Show) -> None:
        self._path, self._name = path, shorten_path(path)
        is_file = path.is_file() or not path.exists()
        self._indices, self._keys = array("q"), array("Q")
        try:
            self._file = open(path, "ab" if is_file else "wb", buffering=0)  # noqa: SIM115 (`close` closes it)
        except OSError as error:
            raise self._error(f"cannot be written ({error.strerror})") from None
        try:
            if is_file:
                self._lock()
                show(f"reading {self._name}")
                self._scan()
        except BaseException:
            self._file.close()
            raise
        indices = np.array(self._indices, np.int64)
        order = np.argsort(indices, kind="stable")
        self._sorted, self._sorted_keys = indices[order], np.array(self._keys, np.uint64)[order]
        self._place = 0

    def _error(self, what: str) -> GenerationError:
        return GenerationError(f"{self._name} {what}; name another file with --out")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._error("is being written by another process") from None
        except OSError:  # a file system without locks
            return

    def _scan(self) -> None:
        """Reads which lines there are; drops a last line that was not finished."""
        end = 0
        with opened(self._path, GenerationError) as file:
            for number, content in enumerate(iter(lambda: file.readline(_LONGEST_RESULT), b""), 1):
                is_whole = content.endswith(b"\n")
                found = _result_key(content)
                if found is not None:
                    self._indices.append(found[0])
                    self._keys.append(found[1])
                elif is_whole or len(content) == _LONGEST_RESULT:
                    raise self._error(f"has a line {number} that is no result of tvm-attn generate --prompts")
                if not is_whole:
                    if found is None:
                        print(f"{self._name}: line {number} is unfinished and is dropped", file=sys.stderr)
                        os.ftruncate(self._file.fileno(), end)
                    else:
                        self._write(b"\n")
                    break
                end += len(content)

    def has(self, line: _Line) -> bool:
        """Whether a line has its result; lines are asked about in their order."""
        while self._place < len(self._sorted) and self._sorted[self._place] < line.index:
            self._place += 1
        if self._place == len(self._sorted) or self._sorted[self._place] != line.index:
            return False
        if int(self._sorted_keys[self._place]) != line.key:
            what = f"holds the result of another line {line.index + 1}, of other options or of another artifact"
            raise self._error(what)
        return True

    def append(self, result: dict[str, Any]) -> None:
        """Writes one line."""
        self._write(json.dumps(result).encode() + b"\n")

    def _write(self, content: bytes) -> None:
        try:
            while content:
                content = content[self._file.write(content) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._error(f"cannot be written ({error.strerror})") from None

    def close(self) -> None:
        """Closes the file, and frees it for others."""
        self._file.close()


def _result_key(content: bytes) -> tuple[int, int] | None:
    """Index and key of a line of the output; None if it is none."""
    try:
        result = json.loads(content)
        index, key = result["index"], int(result["key"], 16)
        return (index, key) if type(index) is int and 0 <= index < 1 << 63 and key < 1 << 64 else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
