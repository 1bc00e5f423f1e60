"""Files of prompts: every line once, whatever interrupts it, and the same result as on its own."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tvm_attn
from tvm_attn import generate
from tvm_attn.errors import GenerationError, UsageError
from tvm_attn.prompt_file import Summary, complete_file
from tvm_attn.runtime.decoding import Completion
from tvm_attn.runtime.model import Model


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> Model:
    return tvm_attn.load(demo_artifact, device="cpu", max_batch=3)


@pytest.fixture
def complete(model: Model, tmp_path: Path) -> Callable[..., Summary]:
    """complete(lines, **options) writes in.jsonl, unless lines is None, and completes it into out.jsonl."""

    def run(lines: list[Any] | bytes | None = None, identity: str = "demo", **options: Any) -> Summary:
        source = tmp_path / "in.jsonl"
        if lines is not None:
            rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
            source.write_bytes(b"".join(row + b"\n" for row in rows))
        given = {"max_new_tokens": 8} | options
        return complete_file(model, source, tmp_path / "out.jsonl", given, identity, lambda *_: None)

    return run


def results(tmp_path: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    by_index = {result["index"]: result for result in found}
    assert len(by_index) == len(found)
    return by_index


PROMPTS = ["Return the", "", "größe", [5, 6, 7], "Raise", "The file", "x", "If", "def f(", "Note"]


def test_each_line_gets_what_it_gets_on_its_own(complete, model, tmp_path):
    lengths = [1 + 5 * (index % 4) for index in range(len(PROMPTS))]
    lines = [
        {"prompt": prompt, "id": f"no. {index}", "max_new_tokens": length}
        for index, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    summary = complete(lines)
    assert (summary.done, summary.skipped, summary.failed) == (len(PROMPTS), 0, 0)
    found = results(tmp_path)
    for index, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        alone = model.generate(prompt, max_new_tokens=length)
        result = found[index]
        assert result["id"] == f"no. {index}"
        assert (result["text"], tuple(result["token_ids"])) == (alone.text, alone.token_ids)
        assert result["finish_reason"] == alone.finish_reason
        assert result["completion_tokens"] == len(alone.token_ids)
        ids = prompt if isinstance(prompt, list) else model.tokenizer.encode(prompt) or [0]
        assert result["prompt_tokens"] == len(ids)
    assert summary.completion_tokens == sum(result["completion_tokens"] for result in found.values())


def test_seeds(complete, model, tmp_path):
    """The seed of the command is for the file as for a list of prompts, the seed of a line for the line."""
    lines = [*({"prompt": prompt} for prompt in PROMPTS[:3]), {"prompt": "Raise", "seed": 5, "n": 2, "temperature": 2}]
    complete(lines, seed=1, temperature=1.5)
    found = results(tmp_path)
    together = model.generate(PROMPTS[:3], max_new_tokens=8, seed=1, temperature=1.5)
    assert [found[index]["text"] for index in range(3)] == [completion.text for completion in together]
    alone = model.generate("Raise", max_new_tokens=8, seed=5, n=2, temperature=2)
    assert [each["text"] for each in found[3]["completions"]] == [completion.text for completion in alone]
    assert found[3]["completion_tokens"] == sum(len(completion.token_ids) for completion in alone)


def test_a_line_may_take_back_an_option(complete, model, tmp_path):
    complete([{"prompt": "Raise", "stop": None, "max_new_tokens": None}], stop=["e"])
    assert results(tmp_path)[0]["text"] == model.generate("Raise").text


@pytest.mark.parametrize("kept", [0, 1, 4, len(PROMPTS)])
def test_goes_on_after_any_number_of_lines(complete, tmp_path, kept):
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    complete(lines)
    out = tmp_path / "out.jsonl"
    whole, before = out.read_bytes().splitlines(keepends=True), results(tmp_path)
    out.write_bytes(b"".join(whole[len(whole) - kept :]))
    summary = complete()
    assert (summary.skipped, summary.done) == (kept, len(PROMPTS) - kept)
    assert results(tmp_path) == before


def test_an_unfinished_last_line_is_done_again(complete, tmp_path, capsys):
    lines = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    complete(lines)
    out = tmp_path / "out.jsonl"
    content, before = out.read_bytes(), results(tmp_path)
    last = content.splitlines(keepends=True)[-1]
    for cut in range(1, len(last) + 1):
        out.write_bytes(content[: len(content) - cut])
        summary = complete()
        assert (summary.skipped, summary.done) == ((3, 0) if cut == 1 else (2, 1))  # 1: only the newline is missing
        assert results(tmp_path) == before
        said = "line 3 is unfinished and is dropped" in capsys.readouterr().err
        assert said == (1 < cut < len(last))


def test_more_lines_at_the_end_are_completed(complete, tmp_path):
    complete([{"prompt": "x"}])
    summary = complete([{"prompt": "x"}, {"prompt": "Raise"}])
    assert (summary.skipped, summary.done) == (1, 1)


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ([{"prompt": "y"}, {"prompt": "Raise"}], {}),
        ([{"prompt": "x", "seed": 1}, {"prompt": "Raise"}], {}),
        ([{"prompt": "Raise"}, {"prompt": "x"}], {}),
        (None, {"max_new_tokens": 9}),
        (None, {"stop": ["a"]}),
        (None, {"identity": "another"}),
    ],
)
def test_a_change_is_noticed_and_nothing_is_written(complete, tmp_path, lines, options):
    complete([{"prompt": "x"}, {"prompt": "Raise"}])
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(GenerationError, match=r"out\.jsonl holds the result of another line 1, of other options"):
        complete(lines, **options)
    assert (tmp_path / "out.jsonl").read_bytes() == before


BAD = [
    (b"{", "it is not valid JSON"),
    (b"[1]", 'it must be an object with a "prompt"'),
    (b"{}", 'it must be an object with a "prompt"'),
    (b"\xff", "it is not UTF-8 text"),
    (b'{"prompt": "a", "prompt": "b"}', "it is not valid JSON: 'prompt' has two values"),
    ({"prompt": None}, '"prompt" is None; it must be text or a list of token ids'),
    ({"prompt": []}, '"prompt" is []'),
    ({"prompt": [True]}, '"prompt" is [True]'),
    ({"prompt": ["a"]}, "\"prompt\" is ['a']"),
    ({"prompt": [10**9]}, "the prompt holds the token id 1000000000"),
    ({"prompt": [1] * 2000}, "the prompt has 2000 tokens"),
    ({"prompt": "a", "tempertaure": 1}, "'tempertaure' is unknown; there are prompt, id, temperature,"),
    ({"prompt": "a", "top_p": 2}, "top_p is 2; it must be a number in (0, 1]"),
    ({"prompt": "a", "n": 0}, "n is 0"),
]


def test_bad_lines_are_reported_with_their_number_and_the_others_completed(complete, tmp_path, capsys):
    lines: list[Any] = []
    for line, _ in BAD:
        lines += [line, b"", {"prompt": "x"}]
    summary = complete(lines)
    assert (summary.done, summary.failed) == (len(BAD), len(BAD))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(BAD)
    for index, (_, message) in enumerate(BAD):
        assert said[index].startswith(f"line {3 * index + 1}: ") and message in said[index], said[index]
    assert set(results(tmp_path)) == {3 * index + 2 for index in range(len(BAD))}
    # A corrected line is completed with the rest in place.
    lines[0] = {"prompt": "now it is one"}
    summary = complete(lines)
    assert (summary.done, summary.skipped, summary.failed) == (1, len(BAD), len(BAD) - 1)


def test_many_bad_lines_are_counted(complete, capsys):
    assert complete([b"{"] * 100).failed == 100
    said = capsys.readouterr().err.splitlines()
    assert (len(said), said[-1]) == (21, "and 80 other lines")


def test_a_line_of_many_megabytes(complete, tmp_path, capsys):
    line = b'{"prompt": "' + b"a" * (40 << 20) + b'"}'
    summary = complete([line, {"prompt": "x"}])
    assert (summary.done, summary.failed) == (1, 1)
    assert capsys.readouterr().err == "line 1: it is longer than 16 MiB\n"
    assert set(results(tmp_path)) == {1}


class Instant:
    """A model that answers at once."""

    def __init__(self) -> None:
        self.scheduler = self.engine = self
        self.max_batch = 4

    def submit(self, prompt: str, options: Any, *, index: int) -> "Instant":
        return self

    prompt_ids = (1,)

    async def wait(self) -> Any:
        return Completion("", (), "length")


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Of 10,000 lines of 10 kB, 100 MB, nothing stays but a key and an index."""
    source, out, count = tmp_path / "in.jsonl", tmp_path / "out.jsonl", 10_000
    with open(source, "w") as file:
        for index in range(count):
            file.write(json.dumps({"prompt": f"{index} " + "a" * 10_000}) + "\n")
    for expected in ((count, 0), (0, count)):
        tracemalloc.start()
        summary = complete_file(Instant(), source, out, {}, "x", lambda *_: None)  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (summary.done, summary.skipped) == expected
        assert peak < 4 << 20


# --- the output file ---


@pytest.mark.parametrize("content", [b"hello\n", b'{"index": 0}\n', b'{"index": -1, "key": "0"}\n', b"{}\n{", b"\n"])
def test_an_output_with_something_else_is_left_alone(complete, tmp_path, content):
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(GenerationError, match=r"has a line 1 that is no result of tvm-attn generate --prompts; name"):
        complete([{"prompt": "x"}])
    assert out.read_bytes() == content


def test_input_and_output_are_different_files(model, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "x"}\n')
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UsageError, match="are one file"):
        complete_file(model, path, tmp_path / "link", {}, "x", lambda *_: None)
    assert path.read_text() == '{"prompt": "x"}\n'


def test_two_processes_do_not_write_one_output(complete, tmp_path):
    with open(tmp_path / "out.jsonl", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(GenerationError, match="is being written by another process"):
            complete([{"prompt": "x"}])
    assert complete().done == 1


def test_an_input_that_is_missing(complete):
    with pytest.raises(GenerationError, match=r"in\.jsonl is missing"):
        complete()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(model, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    with pytest.raises(GenerationError, match="/dev/full cannot be written"):
        complete_file(model, source, Path("/dev/full"), {}, "x", lambda *_: None)


# --- the command ---


def test_the_command(demo_artifact, tmp_path, capsys, model):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Raise", "id": 7}\n{\n')
    command = [str(demo_artifact), "--prompts", str(source), "--out", str(out), "--max-new-tokens", "4", "--device=cpu"]
    assert generate.main(command) == 1  # as a line has failed
    said = capsys.readouterr()
    assert said.out == "" and "line 2: it is not valid JSON" in said.err
    assert said.err.splitlines()[-1].startswith("1 completed, 0 were there, 1 failed; 4 tokens in ")
    assert results(tmp_path)[0]["text"] == model.generate("Raise", max_new_tokens=4).text
    source.write_text('{"prompt": "Raise", "id": 7}\n')
    assert generate.main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["done"], summary["skipped"], summary["failed"]) == (0, 1, 0)
    assert generate.main([*command, "--temperature", "1"]) == 2
    assert "of other options" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--prompts", "x"], ["--out", "x"], ["--out", "x", "--prompt", "a"]])
def test_input_and_output_go_together(arguments, capsys):
    assert generate.main(["no-artifact", *arguments]) == 2
    assert "--prompts names the input and --out the output: one needs the other" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_command_goes_on(demo_artifact, tmp_path, number):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    count = 2000
    source.write_text("".join(json.dumps({"prompt": f"Line {index}", "id": index}) + "\n" for index in range(count)))
    command = [
        sys.executable,
        "-m",
        "tvm_attn.generate",
        str(demo_artifact),
        "--prompts",
        str(source),
        "--out",
        str(out),
    ]
    command += ["--device", "cpu", "--max-new-tokens", "40"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert b"the same command goes on" in err and b"Traceback" not in err
    done = len([line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")])
    assert 5 <= done < count
    source.write_text("".join(source.read_text().splitlines(keepends=True)[: done + 20]))  # enough
    assert generate.main(command[3:]) == 0
    found = results(tmp_path)
    assert set(range(done + 20)) <= set(found)
    assert all(result["id"] == index for index, result in found.items())
