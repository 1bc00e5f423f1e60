"""Damaged ONNX files: each is refused with an error of ours, or what it became is recognised rightly."""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.onnx.test_export import SMALL, save_checkpoint
from tvm_attn.errors import TvmAttnError, VerificationError
from tvm_attn.onnx.checkpoint import open_onnx
from tvm_attn.onnx.compare import compare_with_file
from tvm_attn.onnx.export import export

MUTATIONS = 2000
_MOST_SECONDS = 120  # for one file; a file that never ends fails


def bytes_of(content: bytes, rng: random.Random) -> bytes:
    """Changes, removes, doubles or inserts a few bytes, most of them outside the weights."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, count = rng.randrange(len(changed)), rng.choice([1, 1, 2, 17])
        kind = rng.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at : at + count] = rng.randbytes(count)
        elif kind == 2:
            del changed[at : at + count]
        elif kind == 3:
            changed[at:at] = changed[at : at + count]
        elif rng.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def model_of(content: bytes, rng: random.Random) -> bytes:
    """Changes the graph: a valid message that may be no valid model, or another model."""
    model = onnx.load_from_string(content)
    for _ in range(rng.choice([1, 1, 1, 3])):
        _change(model, rng)
        if not model.graph.node or not model.graph.initializer:
            break
    return model.SerializeToString()


def _change(model: Any, rng: random.Random) -> None:
    graph = model.graph
    node: Any = rng.choice(graph.node)
    weight: Any = rng.choice(graph.initializer)
    value: Any = rng.choice([*graph.input, *graph.output])
    names = [name for other in graph.node for name in (*other.input, *other.output)]
    name, operator = rng.choice(names), rng.choice(["Add", "MatMul", "Relu", "If", "Loop", "Nothing"])
    changes: list[Callable[[], Any]] = [
        lambda: graph.node.remove(node),
        lambda: graph.node.append(node),
        lambda: node.input.append(name),
        lambda: node.input.pop() if node.input else None,
        lambda: node.input.__setitem__(0, name) if node.input else None,
        lambda: node.output.__setitem__(0, name) if node.output else None,
        lambda: setattr(node, "op_type", operator),
        lambda: setattr(node, "domain", rng.choice(["com.microsoft", "ai.onnx.ml", "x" * 1000])),
        lambda: node.attribute.append(onnx.helper.make_attribute("axis", rng.choice([-9, 0, 1 << 40]))),
        lambda: _attribute(node, rng),
        lambda: _dimension(weight, rng),
        lambda: setattr(weight, "data_type", rng.choice([0, 1, 7, 8, 10, 16, 99])),
        lambda: setattr(weight, "name", name),
        lambda: setattr(weight, "data_location", 1),
        lambda: graph.initializer.remove(weight),
        lambda: _values(weight, rng),
        lambda: setattr(value, "name", name),
        lambda: value.type.tensor_type.shape.dim.add(dim_value=rng.choice([-1, 0, 1 << 62])),
        lambda: setattr(model.opset_import[0], "version", rng.choice([-1, 0, 6, 13, 99, 1 << 40])),
        lambda: model.functions.add(name=node.op_type, domain="", output=["y"]),
    ]
    rng.choice(changes)()


def _attribute(node: Any, rng: random.Random) -> None:
    for attribute in node.attribute:
        attribute.i = rng.choice([-1, 0, 3, 1 << 62])
        attribute.f = rng.choice([float("nan"), float("inf"), -1.0, 1e-3])


def _dimension(weight: Any, rng: random.Random) -> None:
    if weight.dims:
        weight.dims[rng.randrange(len(weight.dims))] = rng.choice([0, 1, -1, 1 << 31, 1 << 62])
    else:
        weight.dims.append(rng.choice([0, 1, 7]))


def _values(weight: Any, rng: random.Random) -> None:
    weight.raw_data = weight.raw_data[: rng.randrange(len(weight.raw_data) + 1)] + rng.randbytes(rng.choice([0, 4, 8]))


@contextmanager
def alarm(what: str) -> Iterator[None]:
    """Fails if the block does not end."""

    def late(*_: Any) -> None:
        pytest.fail(f"{what} has not ended within {_MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", [bytes_of, model_of])
@pytest.mark.parametrize("opset", [18, 23])
def test_damaged_files(opset: int, mutate: Callable[[bytes, random.Random], bytes], tmp_path: Path) -> None:
    config = replace(SMALL, bos_token_id=None, eos_token_id=None)
    valid = export(save_checkpoint(tmp_path / "model", config), tmp_path / "model.onnx", opset=opset).file
    content, path = valid.read_bytes(), tmp_path / "damaged.onnx"
    assert "the same logits" in compare_with_file(open_onnx(valid))
    refused = 0
    for seed in range(MUTATIONS // 4):
        what = f"mutation {seed} of {mutate.__name__}, opset {opset}"
        path.write_bytes(mutate(content, random.Random(seed)))
        with alarm(what):
            try:
                checkpoint = open_onnx(path)
                params = dict(checkpoint.params())
                assert params
                compare_with_file(checkpoint)
            except VerificationError as error:
                pytest.fail(f"{what} was recognised as another model: {error}")
            except TvmAttnError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000, what
                refused += 1
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert 0 < refused < MUTATIONS // 4
