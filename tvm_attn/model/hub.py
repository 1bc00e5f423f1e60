"""Finding a checkpoint on the Hugging Face hub: first in the local cache, then over the network."""

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tvm_attn.config import PRESETS
from tvm_attn.errors import CheckpointError, one_line

# Only safetensors: pickled files are not even downloaded.
_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
]
_NAME = r"\w+(?:[.-]\w+)*"
_HUB_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}", re.ASCII)
_MAX_ID_LENGTH = 96
_FIRST_ANSWER_S = 5.0  # if the hub does not answer within this time, it counts as unreachable


class CheckpointUnavailable(CheckpointError):
    """The checkpoint is not on this machine and the hub does not provide it; it may be fine itself."""


def hub_id(model: str) -> str | None:
    """The hub id for `model`: of a preset (`gpt2` is `openai-community/gpt2`), `model` itself, or None."""
    if model in PRESETS:
        return f"openai-community/{model}"
    return model if len(model) <= _MAX_ID_LENGTH and _HUB_ID.fullmatch(model) else None


def hub_snapshot(
    repo_id: str, is_usable: Callable[[Path], bool], on_download: Callable[[str], None] | None = None
) -> Path:
    """The folder with the files of `repo_id` that a build needs, from the local cache or downloaded into it.

    `is_usable` says whether a cached folder holds the weights: it may have only the files that another program needed.
    `on_download` is called with the id before a download.

    Raises CheckpointUnavailable if the hub is unreachable, does not have the model, or refuses access to it.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError:
        raise _unavailable(
            repo_id, "huggingface_hub is not installed: pip install huggingface_hub (the extra hub)"
        ) from None
    with _silent_hub():
        cached, complete = None, False
        try:
            cached, complete = Path(hub.snapshot_download(repo_id, allow_patterns=_FILES, local_files_only=True)), True
        except LocalEntryNotFoundError as error:
            path = getattr(error, "snapshot_path", None)  # a cached folder that lacks some of the files
            cached = None if path is None else Path(path)
        if cached is not None and not is_usable(cached):
            cached = None
        if cached is not None and complete and _has_tokenizer(cached):
            return cached
        try:
            # snapshot_download sets no time limit on its first request, so check first whether the hub answers.
            _within(_FIRST_ANSWER_S, lambda: hub.HfApi().model_info(repo_id, timeout=_FIRST_ANSWER_S))
            if on_download is not None:
                on_download(repo_id)
            return Path(hub.snapshot_download(repo_id, allow_patterns=_FILES))
        except Exception as error:  # from the hub client, its HTTP and transfer libraries, or the operating system
            if cached is not None:
                return cached
            if isinstance(error, GatedRepoError):
                reason = "it is gated: accept its terms on the hub, then run `hf auth login`"
            elif isinstance(error, RepositoryNotFoundError):
                reason = "the hub has no such model, or it is private (`hf auth login`)"
            else:
                reason = f"the hub cannot be reached ({type(error).__name__}: {one_line(error)}): check the network"
            raise _unavailable(repo_id, reason) from None


def _unavailable(repo_id: str, reason: str) -> CheckpointUnavailable:
    return CheckpointUnavailable(f"{repo_id} is not on this machine, and {reason}; or name a folder that holds it")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt"))


def _within(seconds: float, call: Callable[[], object]) -> None:
    """Run `call`, raising what it raises, or TimeoutError after `seconds`: name resolution has no limit of its own."""
    failures: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if failures:
        raise failures[0]


@contextmanager
def _silent_hub() -> Iterator[None]:
    """Keep the hub client's warnings and progress bars off the terminal; restores its settings on exit."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, bars_were_off = logger.level, are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        disable_progress_bars()
        try:
            yield
        finally:
            logger.setLevel(level)
            if not bars_were_off:
                enable_progress_bars()
