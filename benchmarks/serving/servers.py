"""Servers in processes of their own: ours, and llama-cpp-python's on the same weights."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from tvm_attn.errors import BenchmarkError
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.tokenizer import BYTE_OF_CHARACTER

_START_SECONDS = 300.0
_PEER_MODULES = ("llama_cpp", "gguf", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")

BYTES = json.dumps(
    {
        "model": {"vocab": BYTE_OF_CHARACTER, "merges": ["a a"]},
        "added_tokens": [],
    }
)
"""A tokenizer.json whose tokens are bytes: the text "AB" is the tokens 65 and 66."""


@dataclass
class ServerProcess:
    """A running server.

    Attributes:
        name: in tables.
        url: without a path.
        takes_ids: whether prompts and answers may be token ids.
        fields: of every request, among them what lets it go on beyond the end of the text.
    """

    name: str
    url: str
    process: subprocess.Popen[bytes]
    takes_ids: bool
    fields: dict[str, Any]

    def memory(self) -> int:
        """Resident bytes of the process."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """Processor time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def check(self) -> None:
        """Raises BenchmarkError if the process has ended."""
        if self.process.poll() is not None:
            raise BenchmarkError(f"{self.name} has ended with status {self.process.returncode}; see its log above")


@contextmanager
def our_server(artifact: Path, *, max_batch: int, queue: int, threads: int, device: str) -> Iterator[ServerProcess]:
    """`tvm-attn serve`; its name for the model is "model"."""
    command = [sys.executable, "-m", "tvm_attn", "serve", str(artifact), "--name", "model", "--device", device]
    command += ["--max-batch", str(max_batch), "--queue", str(queue), "--threads", str(threads)]
    with _running("tvm_attn", command, True, {"ignore_eos": True, "return_token_ids": True}) as server:
        yield server


@contextmanager
def llama_server(artifact: Artifact, precision: str, threads: int, scratch: Path) -> Iterator[ServerProcess]:
    """llama-cpp-python's server. It computes one request at a time; the others wait.

    It takes only text. Without a tokenizer in the artifact it gets one whose first tokens are single bytes.

    Raises:
        BenchmarkError: it is not installed.
    """
    if missing := [module for module in _PEER_MODULES if find_spec(module) is None]:
        names = "gguf 'llama-cpp-python[server]'"
        raise BenchmarkError(f"{', '.join(missing)} is missing for llama.cpp's server; pip install {names}")
    from benchmarks.peers.llamacpp import write_gguf
    from benchmarks.peers.weights import Weights, write_weights

    write_weights(artifact, scratch)
    path = scratch / "model.gguf"
    write_gguf(Weights(scratch), precision, path, artifact.tokenizer_json() or BYTES)
    context = str(artifact.config.n_positions)
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--model_alias", "model"]
    command += ["--n_ctx", context, "--n_batch", context, "--n_ubatch", context, "--logits_all", "False"]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--interrupt_requests", "False"]
    bias = {str(token_id): -100.0 for token_id in artifact.config.eos_token_ids}
    name = f"llama-cpp-python {version('llama-cpp-python')}"
    with _running(name, command, False, {"logit_bias": bias} if bias else {}) as server:
        yield server


@contextmanager
def _running(name: str, command: list[str], takes_ids: bool, fields: dict[str, Any]) -> Iterator[ServerProcess]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*command, "--port", str(port)] + ([] if "tvm_attn" in command else ["--host", "127.0.0.1"])
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if name.startswith("llama") else None
    )
    server = ServerProcess(name, f"http://127.0.0.1:{port}", process, takes_ids, fields)
    try:
        end = time.monotonic() + _START_SECONDS
        while not _answers(server.url):
            server.check()
            if time.monotonic() > end:
                raise BenchmarkError(f"{name} has not started within {_START_SECONDS:g} s")
            time.sleep(0.1)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
