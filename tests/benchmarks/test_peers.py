"""Other runtimes in their own processes: they run our model, stop between requests, and are left out if absent."""

import importlib.util
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare import compare_logits
from benchmarks.peers import PEERS
from benchmarks.peers.client import PeerProcess, PeerUnavailable
from benchmarks.peers.weights import Weights, write_weights
from tvm_attn.benchmark.system import Case
from tvm_attn.config import param_shapes
from tvm_attn.model.reference import Reference
from tvm_attn.runtime.artifact import Artifact

TOKENS = np.random.default_rng(0).integers(0, 2048, 21, dtype=np.int32)
# Bounds on the NMSE of the peer's logits against float64. ggml's GELU is a table of float16; quantization is coarser.
NMSE = {"float32": 1e-6, "float16": 1e-5, "bfloat16": 1e-3, "int8": 1e-2, "q8_0": 1e-3, "q4_0": 5e-2}


@pytest.fixture(scope="module")
def weights(demo_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_weights(Artifact(demo_artifact), folder)
    return folder


@pytest.fixture(scope="module")
def expected(weights: Path) -> np.ndarray:
    """float64 logits (V,) after TOKENS."""
    given = Weights(weights)
    return Reference(given.config, given.all(), "float64").logits(TOKENS[None])[0, -1]


def state(process_id: int) -> str:
    """The state of a process according to Linux; "" if it is gone."""
    try:
        text = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return ""
    return text.rpartition(")")[2].split()[0]


def settled_state(process_id: int, wanted: str) -> str:
    """Like `state`, but waits some time for the wanted state: signals are not instant."""
    deadline = time.monotonic() + 10
    while state(process_id) != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return state(process_id)


def test_weights_are_the_artifacts(demo_artifact: Path, weights: Path) -> None:
    artifact, given = Artifact(demo_artifact), Weights(weights)
    assert given.config == artifact.config
    assert given.head == "wte.weight"
    for name in param_shapes(artifact.config):
        np.testing.assert_array_equal(given.read(name), artifact.parameters.read(name))


@pytest.mark.parametrize(
    ("name", "precision"), [(name, precision) for name, peer in PEERS.items() for precision in peer.precisions]
)
def test_peer_runs_the_same_model(name: str, precision: str, weights: Path, expected: np.ndarray) -> None:
    if any(importlib.util.find_spec(module) is None for module in PEERS[name].modules):
        pytest.skip(f"not installed: {PEERS[name].install}")
    peer = PeerProcess(PEERS[name], weights, precision, 1, sys.executable)
    try:
        assert peer.precision == precision
        given = peer.logits(TOKENS)
        assert "prefill" in given
        agreement = compare_logits(dict.fromkeys(given, expected.astype(np.float32)), given, NMSE[precision])
        assert agreement.nmse <= NMSE[precision]
        for case in (Case("prefill", 5), Case("decode", 30), Case("decode", 30, 2)):
            assert peer.supports(case)
            if case.phase == "decode":
                peer.fill(case)
            times = peer.time(case, 0.01)
            assert len(times) >= 2 and min(times) > 0
        assert compare_logits(given, peer.logits(TOKENS), 0.0).nmse == 0.0
    finally:
        peer.close()


def test_a_peer_stands_still_between_requests(weights: Path) -> None:
    peer = PeerProcess(PEERS["torch"], weights, "float32", 1, sys.executable)
    try:
        process_id, scratch = peer._process.pid, Path(peer._scratch.name)
        assert settled_state(process_id, "T") == "T"
        peer.logits(TOKENS)
        assert settled_state(process_id, "T") == "T"
        assert scratch.is_dir()
    finally:
        peer.close()
    assert state(process_id) == ""
    assert not scratch.exists()


def test_a_peer_that_fails_says_why(weights: Path) -> None:
    peer = PeerProcess(PEERS["torch"], weights, "float32", 1, sys.executable)
    try:
        with pytest.raises(PeerUnavailable, match=r"^torch: IndexError: index out of range"):
            peer.time(Case("prefill", 257), 0.0)
        with pytest.raises(PeerUnavailable, match=r"^torch: its process ended \(.*IndexError"):
            peer.time(Case("prefill", 5), 0.0)
    finally:
        peer.close()


def test_a_peer_without_its_python_is_left_out(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match="cannot be started"):
        PeerProcess(PEERS["torch"], weights, "float32", 1, str(tmp_path / "python"))


def test_a_missing_peer_is_named_with_its_install_command(weights: Path, python_without: str) -> None:
    with pytest.raises(PeerUnavailable) as raised:
        PeerProcess(PEERS["torch"], weights, "float32", 1, python_without)
    assert str(raised.value) == "torch: transformers not installed; to compare: pip install torch transformers"


def test_a_peer_needs_no_tvm(weights: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    code = "import sys, runpy; sys.modules['tvm'] = sys.modules['tvm_ffi'] = None; sys.argv = sys.argv[2:]; "
    code += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    os.chmod(python, 0o755)
    peer = PeerProcess(PEERS["torch"], weights, "float32", 1, str(python))
    peer.close()


@pytest.mark.parametrize(
    ("peer", "wanted", "ours", "precision"),
    [
        ("torch", None, "bfloat16", "bfloat16"),
        ("torch", "float32", "bfloat16", "float32"),
        ("onnxruntime", None, "bfloat16", "float32"),
        ("llamacpp", None, "int8", "q8_0"),
        ("llamacpp", None, "int4", "q4_0"),
        ("ctranslate2", None, "int8", "int8"),
        ("torch", "q4_0", "float32", None),
    ],
)
def test_precision(peer: str, wanted: str | None, ours: str, precision: str | None) -> None:
    assert PEERS[peer].precision(wanted, ours) == precision
