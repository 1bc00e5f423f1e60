"""Finding checkpoints on the hub: a small hub on the loopback interface, and a client process as a user would run it.

The client's settings come from the environment when it is imported, so each case is a process of its own; its standard
error must stay empty, since nothing may come between a command and its one line.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tvm_attn.model.hub import CheckpointUnavailable, hub_id, hub_snapshot

REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"read me",
}
CLIENT = """
import sys
from pathlib import Path
from tvm_attn.errors import CheckpointError
from tvm_attn.model import hub
hub._FIRST_ANSWER_S = 1.0
try:
    folder = hub.hub_snapshot(sys.argv[1], lambda f: (f / "model.safetensors").is_file(), lambda id: print("gets", id))
    print(folder.name, *sorted(file.name for file in folder.iterdir()))
except CheckpointError as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """The four requests of the hub's protocol that downloading a model takes; one model, `some/model`."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path, name = self.path.split("?")[0], self.path.split("?")[0].rpartition("/")[2]
        headers = {"X-Repo-Commit": REVISION}
        status = 200
        if path.startswith("/api/models/some/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES.items()
            ]
            body = json.dumps(tree).encode()
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "some/model", "sha": REVISION, "siblings": siblings}).encode()
        elif path.startswith("/some/model/resolve/") and name in FILES:
            body = FILES[name]
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        else:
            status, body = 404, b"{}"
            headers["X-Error-Code"] = "RepoNotFound"
        self.send_response(status)
        for key, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def client(home: Path, endpoint: str, repo_id: str = "some/model", **env: str) -> str:
    """What the client prints for `repo_id`, with its cache in `home`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**inherited, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", **env}
    command = [sys.executable, "-c", CLIENT, repo_id]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert result.stderr == ""
    assert result.returncode == 0
    return result.stdout.strip()


def unused_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def cached_snapshot(home: Path) -> Path:
    return home / "hub" / "models--some--model" / "snapshots" / REVISION


def test_downloads_once_and_no_pickles(tmp_path: Path, endpoint: str) -> None:
    files = f"{REVISION} config.json model.safetensors tokenizer.json"
    assert client(tmp_path, endpoint) == f"gets some/model\n{files}"
    # From now on the cache is enough, whatever became of the hub.
    assert client(tmp_path, unused_endpoint()) == files
    assert client(tmp_path, endpoint, HF_HUB_OFFLINE="1") == files


def test_a_cache_without_weights_or_tokenizer_is_completed(tmp_path: Path, endpoint: str) -> None:
    files = f"{REVISION} config.json model.safetensors tokenizer.json"
    for missing in ("model.safetensors", "tokenizer.json"):
        client(tmp_path, endpoint)
        (cached_snapshot(tmp_path) / missing).unlink()
        assert client(tmp_path, endpoint) == f"gets some/model\n{files}"


def test_without_a_network_a_cache_with_weights_is_enough(tmp_path: Path, endpoint: str) -> None:
    client(tmp_path, endpoint)
    (cached_snapshot(tmp_path) / "tokenizer.json").unlink()
    assert client(tmp_path, unused_endpoint()) == f"{REVISION} config.json model.safetensors"
    (cached_snapshot(tmp_path) / "model.safetensors").unlink()
    assert client(tmp_path, unused_endpoint()).startswith("CheckpointUnavailable some/model is not on this machine, ")


def test_a_model_that_the_hub_does_not_have(tmp_path: Path, endpoint: str) -> None:
    said = client(tmp_path, endpoint, "some/other")
    assert said.startswith("CheckpointUnavailable some/other is not on this machine, and the hub has no such model")
    assert "\n" not in said


def test_a_hub_that_is_out_of_reach(tmp_path: Path) -> None:
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        said = client(tmp_path, unused_endpoint(), **env)
        assert said.startswith(
            "CheckpointUnavailable some/model is not on this machine, and the hub cannot be reached ("
        )
        assert said.endswith("; or name a folder that holds it")
        assert "\n" not in said


def test_a_hub_that_never_answers(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and that is all
        said = client(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said.startswith("CheckpointUnavailable some/model is not on this machine, and the hub cannot be reached (")


def test_says_how_to_get_the_hub_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # `import huggingface_hub` raises ImportError
    with pytest.raises(CheckpointUnavailable, match=r"some/model .* pip install huggingface_hub .*; or name a folder"):
        hub_snapshot("some/model", Path.is_dir)


def test_hub_ids() -> None:
    assert hub_id("gpt2") == "openai-community/gpt2"
    assert hub_id("gpt2-xl") == "openai-community/gpt2-xl"
    for model in ("distilgpt2", "some/model", "Some-Org/my_model.v1", "a/0"):
        assert hub_id(model) == model
    for model in (
        "",
        "/",
        "a/",
        "/a",
        "a/b/c",
        "./a",
        "../a",
        "a..b/c",
        "a--b",
        "a b",
        "~a",
        "-a",
        "a/b-",
        "ä",
        "a" * 97,
    ):
        assert hub_id(model) is None
