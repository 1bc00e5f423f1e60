"""The exceptions of tvm_attn: one type per cause, all derived from `TvmAttnError`.

Every message is one line that says what was wrong and what to do; the commands print it and exit with status 2.
Text that it quotes from a file or an argument goes through `shorten` or `one_line`, so that it stays short.
"""

import reprlib


class TvmAttnError(Exception):
    """Base class of every error that tvm_attn raises on purpose."""


class UsageError(TvmAttnError):
    """A command was called with arguments that it does not take."""


class ConfigError(TvmAttnError):
    """A model configuration is malformed or asks for something that is not supported."""


class CheckpointError(TvmAttnError):
    """A checkpoint is missing, unreadable, or its tensors do not fit its configuration."""


class TokenizerError(TvmAttnError):
    """Tokenizer files are unreadable, or text was given where no tokenizer exists."""


class TargetError(TvmAttnError):
    """A target is unknown, its file is malformed, or this machine cannot build for it."""


class ScheduleError(TvmAttnError):
    """A kernel has no schedule template for the target, or a tuned record does not fit its template."""


class CompileError(TvmAttnError):
    """TVM or the C++ tool chain failed to build the library."""


class VerificationError(TvmAttnError):
    """The compiled functions disagree with the PyTorch reference beyond the stated bounds."""


class ArtifactError(TvmAttnError):
    """An artifact is incomplete, was altered, or was made for another machine or version."""


class DeviceError(TvmAttnError):
    """The requested device is absent, or lacks the memory or features that are needed."""


class GenerationError(TvmAttnError):
    """The arguments of a generation request are invalid, e.g. a prompt longer than the context."""


class QueueFullError(GenerationError):
    """As many requests wait as may wait; try again later."""


class PromptTooLongError(GenerationError):
    """A prompt has more tokens than the model's context."""


class ServerError(TvmAttnError):
    """The server cannot start: its address cannot be used, or a library is missing."""


class BenchmarkError(TvmAttnError):
    """A benchmark was asked for something that does not fit the model, or for a file it cannot write."""


class AttentionError(TvmAttnError):
    """Tensors or options of `tvm_attn.attention` do not fit each other."""


class OnnxError(TvmAttnError):
    """An ONNX file cannot be read or written, or asks for something that is not supported."""


class TuningError(TvmAttnError):
    """A search for tuned records cannot run with what it was given, or found nothing."""


def shorten(value: object, limit: int = 40) -> str:
    """`repr(value)` in at most `limit` characters, for a message that quotes a file or an argument."""
    if isinstance(value, str | bytes):
        value = value[: limit + 1]  # megabytes of text need no repr that would then be cut
    try:
        # The parts of a container are cut before they are written; arrays and tensors are written in several lines.
        short = isinstance(value, list | tuple | dict | set | frozenset)
        text = " ".join((reprlib.repr if short else repr)(value).split())
    except Exception:  # an int with more digits than Python prints, very deep nesting, or a repr that fails
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's message, shortened, or its type's name if it has none."""
    lines = str(error).strip().splitlines()
    line = lines[0][:limit] if lines else type(error).__name__
    # A library's message may quote characters of a file that move the terminal's cursor.
    return line if line.isprintable() else repr(line)[1:-1]
