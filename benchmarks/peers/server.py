"""The process of a peer: builds the runtime from a folder of weights, then answers requests over a socket.

A message is one JSON object. Python objects are never sent.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import PEERS
from benchmarks.peers.weights import Weights
from tvm_attn.benchmark.system import Case, System

Factory = Callable[[Weights, str, int, Path], System]
"""Makes a system from weights, a precision, a number of threads and a folder for its files."""


def serve(name: str, factory: Factory) -> None:
    """Runs a peer's process; `name` is its entry in `PEERS`. Returns when the other side is gone."""
    # A new process group: Ctrl-C reaches only the parent, and when the parent dies the kernel ends stopped members.
    os.setpgid(0, 0)
    parser = argparse.ArgumentParser(description=f"The {name} peer of benchmarks.compare; not for use by hand.")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--socket", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    args = parser.parse_args()
    connection = Connection(args.socket)
    missing = [module for module in PEERS[name].modules if importlib.util.find_spec(module) is None]
    if missing:
        _send(connection, {"missing": missing})
        return
    try:
        system = factory(Weights(args.weights), args.precision, args.threads, args.scratch)
    except Exception as error:  # whatever a foreign library raises is the reason for leaving the peer out
        _send(connection, {"error": f"{type(error).__name__}: {error}"})
        raise
    _send(connection, {"name": system.name, "version": system.version, "precision": system.precision})
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            _send(connection, _answer(system, request))
        except Exception as error:
            _send(connection, {"error": f"{type(error).__name__}: {error}"})
            raise


def _answer(system: System, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "logits":
        ids = np.array(request["ids"], np.int32)
        return {name: logits.tolist() for name, logits in system.logits(ids).items()}
    case = Case(**request["case"])
    if request["do"] == "supports":
        return {"supports": system.supports(case)}
    if request["do"] == "fill":
        system.fill(case)
        return {}
    return {"seconds": system.time(case, request["seconds"])}


def _send(connection: Connection, answer: dict[str, Any]) -> None:
    try:
        connection.send_bytes(json.dumps(answer).encode())
    except BrokenPipeError:
        sys.exit(0)
