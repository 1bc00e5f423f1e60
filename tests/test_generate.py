"""The generate command: what it passes on, what it prints, and how it and every command ends."""

import io
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import tvm_attn
from tvm_attn import cli, generate
from tvm_attn.errors import ArtifactError, GenerationError
from tvm_attn.runtime.decoding import Completion, GenerationStats
from tvm_attn.runtime.logprobs import TokenLogprobs


class ByteTokenizer:
    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode()


class FakeModel:
    """Answers every prompt with " wörld" in two pieces, and remembers the options."""

    def __init__(self, tokenizer: ByteTokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.options: dict[str, Any] = {}
        self.prompts: list[Any] = []
        self.fail: Callable[[], None] = lambda: None

    def tokenizer_json(self) -> str | None:
        return "{}" if self.tokenizer else None

    def _note(self, prompts: list[Any], stats: GenerationStats, options: dict[str, Any]) -> None:
        self.prompts += prompts
        self.options = options
        stats.prompt_tokens, stats.prefill_seconds = 10, 0.25
        stats.decode_tokens, stats.decode_seconds = 1, 0.5
        stats.first_token_seconds = 0.125

    def stream(self, prompt: Any, *, stats: GenerationStats, **options: Any) -> Iterator[str]:
        assert self.tokenizer is not None
        self._note([prompt], stats, options)
        return self._pieces([" wö", "rld"])

    def stream_ids(self, prompt: Any, *, stats: GenerationStats, **options: Any) -> Iterator[int]:
        self._note([prompt], stats, options)
        return self._pieces([7, 8])

    def _pieces(self, pieces: list[Any]) -> Iterator[Any]:
        yield pieces[0]
        self.fail()
        yield pieces[1]

    def generate(self, prompts: list[Any], *, stats: GenerationStats, **options: Any) -> list[Completion]:
        self._note(prompts, stats, options)
        text = " wörld" if self.tokenizer else ""
        return [Completion(text, (7, 8), "length") for _ in range(len(prompts) * options["n"])]


@pytest.fixture
def model(monkeypatch) -> FakeModel:
    """What tvm_attn.load gives; `loaded` holds its arguments."""
    model = FakeModel(ByteTokenizer())
    model.loaded = []

    def load(*args: Any, **options: Any) -> FakeModel:
        assert os.environ["TVM_USE_RUNTIME_LIB"] == "1"
        model.loaded.append((args, options))
        return model

    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", "1")  # so that it is gone after the test
    monkeypatch.delenv("TVM_USE_RUNTIME_LIB")
    monkeypatch.setattr(tvm_attn, "load", load, raising=False)
    monkeypatch.setattr(generate, "open_artifact", lambda folder, device: model)
    return model


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# --- the arguments ---


def test_the_checkpoints_own_sampling_is_used_where_it_is_asked_for(model):
    model.generation_config = {"temperature": 0.7, "top_k": 5, "max_new_tokens": 9}
    assert generate.main(["dist/x", "--prompt", "Hello"]) == 0
    assert (model.options["temperature"], model.options["top_k"], model.options["max_new_tokens"]) == (None, None, 128)
    given = ["--use-generation-config", "--top-k", "3", "--max-new-tokens", "128", "--seed", "1"]
    assert generate.main(["dist/x", "--prompt", "Hello", *given]) == 0
    assert (model.options["temperature"], model.options["top_k"], model.options["max_new_tokens"]) == (0.7, 3, 128)
    assert model.options["seed"] == 1


def test_defaults(model):
    assert generate.main(["dist/x", "--prompt", "Hello"]) == 0
    assert model.loaded == [((Path("dist/x"),), {"device": "auto", "threads": None, "max_batch": 8})]
    assert model.prompts == ["Hello"]
    assert model.options == {
        "max_new_tokens": 128,
        "min_new_tokens": 0,
        "n": 1,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "stop": (),
        "stop_token_ids": None,
        "seed": None,
        "logprobs": None,
        "prompt_logprobs": False,
        "speculate": "auto",
    }


def test_every_option_is_passed_on(model):
    command = (
        "dist/x --prompt Hello --max-new-tokens 3 --min-new-tokens 2 -n 2 --temperature 0.5 --top-k 4 "
        "--top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --stop a --stop b --stop-token-id 5 --stop-token-id 6 "
        "--seed 7 --logprobs 3 --prompt-logprobs --speculate prompt --json --device cpu --threads 2 --max-batch 3"
    )
    assert generate.main(command.split()) == 0
    assert model.loaded == [((Path("dist/x"),), {"device": "cpu", "threads": 2, "max_batch": 3})]
    assert model.options == {
        "max_new_tokens": 3,
        "min_new_tokens": 2,
        "n": 2,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "stop": ["a", "b"],
        "stop_token_ids": [5, 6],
        "seed": 7,
        "logprobs": 3,
        "prompt_logprobs": True,
        "speculate": "prompt",
    }


@pytest.mark.parametrize("data, prompt", [(b"one\n", "one"), ("größe\n\n".encode(), "größe\n"), (b"", "")])
def test_a_dash_reads_stdin_less_one_newline(model, monkeypatch, data, prompt):
    give_stdin(monkeypatch, data)
    assert generate.main(["dist/x", "--prompt", "-"]) == 0
    assert model.prompts == [prompt]


def test_without_a_prompt_off_a_terminal_stdin_is_it(model, monkeypatch, capsys):
    give_stdin(monkeypatch, b"one\n")
    assert generate.main(["dist/x"]) == 0
    assert model.prompts == ["one"]
    give_stdin(monkeypatch, b"")
    assert generate.main(["dist/x"]) == 2
    assert "there is no prompt, and standard input is empty" in capsys.readouterr().err


def test_token_ids_that_are_none(model, capsys):
    assert generate.main(["dist/x", "--prompt-ids", "1,two"]) == 2
    assert "argument --prompt-ids: '1,two' is not a list of integers such as 1,2,3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["dist/x", "--prompt", "a", "--prompts", "b", "--out", "c"],
        ["dist/x", "--prompt", "a", "--prompt-ids", "1"],
        ["dist/x", "--prompt", "a", "--top-k", "many"],
    ],
)
def test_wrong_usage(model, arguments, capsys):
    assert generate.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ") and err.endswith("see tvm-attn generate --help\n")


@pytest.mark.parametrize(
    ("text", "stop"),
    [(r"\n", "\n"), (r"a\tb\r", "a\tb\r"), (r"\\n", r"\n"), (r"\d\x41", r"\d\x41"), ("\n", "\n"), ("\\", "\\")],
)
def test_stop_strings_have_escapes_for_what_is_hard_to_type(model, text, stop):
    assert generate.main(["dist/x", "--prompt", r"a\n", "--stop", text]) == 0
    assert model.options["stop"] == [stop]
    assert model.prompts == [r"a\n"]


def test_text_for_an_artifact_without_a_tokenizer_is_refused_before_it_is_loaded(model, capsys):
    model.tokenizer = None
    assert generate.main(["dist/x", "--prompt", "Hello"]) == 2
    assert "has no tokenizer: give token ids, as in --prompt-ids 1,2,3" in capsys.readouterr().err
    assert model.loaded == []


# --- what is printed ---


def test_prints_the_prompt_and_what_follows(model, capsys):
    assert generate.main(["dist/x", "--prompt", "Hello"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello wörld\n"
    assert err.splitlines() == [
        "prefill: 10 tokens in 0.250 s, 40.0 tokens/s",
        "first token: after 0.125 s",
        "decode: 1 token in 0.500 s, 2.0 tokens/s",
    ]


def test_prints_each_piece_as_it_comes(model, capsys):
    seen = []
    model.fail = lambda: seen.append(capsys.readouterr().out)
    assert generate.main(["dist/x", "--prompt", "Hello"]) == 0
    assert seen == ["Hello wö"]
    assert capsys.readouterr().out == "rld\n"


def test_ids_are_shown_as_text_where_there_is_a_tokenizer(model, capsys):
    assert generate.main(["dist/x", "--prompt-ids", "72,105"]) == 0
    assert model.prompts == [[72, 105]]
    assert capsys.readouterr().out == "Hi wörld\n"


def test_without_a_tokenizer_ids_are_printed(model, capsys):
    model.tokenizer = None
    assert generate.main(["dist/x", "--prompt-ids", "1,2,3"]) == 0
    assert capsys.readouterr().out == "1,2,3,7,8\n"
    assert generate.main(["dist/x", "--prompt-ids", "1,2,3", "--prompt-ids", "4"]) == 0
    assert capsys.readouterr().out == "1,2,3,7,8\n\n4,7,8\n"


def test_several_prompts_are_one_batch(model, capsys):
    assert generate.main(["dist/x", "--prompt", "Hello", "--prompt", "Bye"]) == 0
    assert model.prompts == ["Hello", "Bye"]
    out, err = capsys.readouterr()
    assert out == "Hello wörld\n\nBye wörld\n"
    assert "40.0 tokens/s" in err


def test_several_completions_of_a_prompt(model, capsys):
    assert generate.main(["dist/x", "--prompt", "Hello", "-n", "2"]) == 0
    assert model.prompts == ["Hello"]
    assert capsys.readouterr().out == "Hello wörld\n\nHello wörld\n"


def test_json(model, capsys):
    timings = {
        "prompt_tokens": 10,
        "reused_tokens": 0,
        "prefill_seconds": 0.25,
        "decode_tokens": 1,
        "decode_seconds": 0.5,
        "first_token_seconds": 0.125,
        "guessed_tokens": 0,
        "accepted_tokens": 0,
        "prefill_tokens_per_second": 40.0,
        "decode_tokens_per_second": 2.0,
    }
    completion = {"text": " wörld", "token_ids": [7, 8], "finish_reason": "length"}
    assert generate.main(["dist/x", "--prompt", "Hello", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {**completion, "timings": timings}
    assert err == ""
    assert generate.main(["dist/x", "--prompt", "Hello", "--prompt", "Bye", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"completions": [completion] * 2, "timings": timings}


def test_log_probabilities_are_json(model, monkeypatch, capsys):
    found = TokenLogprobs(7, -0.5, ((7, -0.5), (9, -2.0)))
    completion = Completion("x", (7,), "length", (found,), (None, found))
    monkeypatch.setattr(model, "generate", lambda prompts, **options: [completion])
    assert generate.main(["dist/x", "--prompt", "Hello", "--logprobs", "2", "--prompt-logprobs", "--json"]) == 0
    printed = {"token_id": 7, "logprob": -0.5, "top": [[7, -0.5], [9, -2.0]]}
    read = json.loads(capsys.readouterr().out)
    assert (read["logprobs"], read["prompt_logprobs"]) == ([printed], [None, printed])
    for option in (["--logprobs", "2"], ["--prompt-logprobs"]):
        assert generate.main(["dist/x", "--prompt", "Hello", *option]) == 2
        assert "add --json" in capsys.readouterr().err


# --- errors ---


def test_a_wrong_option_is_refused_before_the_model_is_loaded(model, capsys):
    assert generate.main(["dist/x", "--prompt", "Hello", "--top-p", "2"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: top_p is 2.0; it must be a number in (0, 1]\n")
    assert model.loaded == []


def test_stdin_that_is_no_text(model, monkeypatch, capsys):
    give_stdin(monkeypatch, b"\xff")
    assert generate.main(["dist/x", "--prompt", "-"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input is not UTF-8 text")


def test_an_error_is_one_line(model, monkeypatch, capsys):
    def load(*_args: Any, **_options: Any) -> None:
        raise ArtifactError("lib.so in\ndist/x was altered" + 1000 * " and")

    monkeypatch.setattr(tvm_attn, "load", load, raising=False)
    assert generate.main(["dist/x", "--prompt", "Hello"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: lib.so in dist/x was altered and") and err.count("\n") == 1
    assert len(err) < 1100


def test_a_refused_prompt_is_not_printed(model, monkeypatch, capsys):
    def refuse(*_args: Any, **_options: Any) -> None:
        raise GenerationError("too long")

    monkeypatch.setattr(model, "stream", refuse)
    assert generate.main(["dist/x", "--prompt", "Hello"]) == 2
    assert capsys.readouterr() == ("", "error: too long\n")


def test_ctrl_c_ends_quietly(model, capsys):
    def interrupt() -> None:
        raise KeyboardInterrupt

    model.fail = interrupt
    assert generate.main(["dist/x", "--prompt", "Hello"]) == 130
    out, err = capsys.readouterr()
    assert out == "Hello wö"
    assert "Traceback" not in err and "tokens/s" not in err


# --- the loop on a terminal ---

TERMINAL = """
import sys, time
from contextlib import suppress
sys.path.insert(0, {tests!r})
import tvm_attn
from test_generate import ByteTokenizer, FakeModel
from tvm_attn import generate
from tvm_attn.errors import GenerationError

class Model(FakeModel):
    def stream(self, prompt, **options):
        if prompt == "bad":
            raise GenerationError("the prompt is bad")
        return super().stream(prompt, **options)

    def fail(self):
        if self.prompts[-1] == "slow":
            print("<waits>", flush=True)
            time.sleep(60)

model = Model(ByteTokenizer())
model.fail = lambda: Model.fail(model)
loads = []
tvm_attn.load = lambda *_, **__: loads.append(1) or model
generate.open_artifact = lambda *_: model
status = generate.main(["dist/x", "--seed", "3"])
print("status", status, "loads", len(loads), "prompts", model.prompts, "seed", model.options["seed"])
"""


class Terminal:
    """A process whose standard streams are a terminal."""

    def __init__(self) -> None:
        ours, theirs = os.openpty()
        self.end, self.said = ours, ""
        script = TERMINAL.format(tests=str(Path(__file__).parent))
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "TERM": "dumb"},
            preexec_fn=self._take_terminal,
            **streams,
        )
        os.close(theirs)

    @staticmethod
    def _take_terminal() -> None:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches it

    def expect(self, text: str) -> None:
        """Reads until there is `text`, and drops all up to its end."""
        while text not in self.said:
            ready, _, _ = select.select([self.end], [], [], 60)
            assert ready, f"no {text!r} in {self.said!r}"
            try:
                self.said += os.read(self.end, 4096).decode()
            except OSError:  # the other end is closed
                raise AssertionError(f"no {text!r} in {self.said!r}") from None
        self.said = self.said.split(text, 1)[1]

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def interrupt(self) -> None:
        """Presses Ctrl-C until there is a new prompt: input() misses a signal that comes while it handles a key."""
        for _ in range(30):
            self.type("\x03")
            if "> " in self.said or select.select([self.end], [], [], 2)[0]:
                return self.expect("> ")
        raise AssertionError("no prompt after Ctrl-C")


def test_the_loop_keeps_the_model_and_goes_on():
    terminal = Terminal()
    try:
        terminal.expect("Ctrl-C stops an answer, Ctrl-D ends.")
        terminal.expect("> ")
        terminal.type("Hello\n")
        terminal.expect("Hello wörld")
        terminal.expect("2.0 tokens/s")
        terminal.expect("> ")
        terminal.type("\n")  # nothing to complete
        terminal.expect("> ")
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.interrupt()  # drops it
        terminal.type("slow\n")
        terminal.expect("<waits>")
        terminal.type("\x03")
        terminal.expect("> ")
        terminal.type("bad\n")
        terminal.expect("error: the prompt is bad")
        terminal.expect("> ")
        terminal.type("\x1b[A\x1b[A\x1b[A\n")  # three lines up: "Hello" again, without what was dropped
        terminal.expect("Hello wörld")
        terminal.expect("> ")
        terminal.type("\x04")
        terminal.expect("status 0 loads 1 prompts ['Hello', 'slow', 'Hello'] seed 3")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


def test_the_loop_has_no_json(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert generate.main(["dist/x", "--json"]) == 2
    assert "--json needs a prompt" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)


def run_script(script: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "import sys\nfrom tvm_attn.cli import run\n" + script]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], **options
    )


@pytest.mark.parametrize("lines", [1, 100_000])  # the pipe breaks when the buffer is flushed, and while printing
def test_a_broken_pipe_is_quiet(lines):
    # The script waits for its reader to be gone.
    script = (
        f"def main():\n sys.stdin.read()\n for _ in range({lines}): print('x' * 10)\n return 0\nsys.exit(run(main))"
    )
    process = run_script(script, stdin=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert (process.wait(60), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_characters_that_the_terminal_lacks_are_replaced():
    process = run_script("sys.exit(run(lambda: print('größe')))", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (b"gr??e" + os.linesep.encode(), b"", 0)


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "tvm_attn.generate", "no-such-artifact", "--prompt", "x", "--top-k", "0"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=60)
    assert process.returncode == 2
    assert process.stderr == "error: top_k is 0; it must be an integer of at least 1\n"
