"""Tensors shared with PyTorch through DLPack, and streams: what waits for what."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi

import tvm_attn
from tvm_attn.errors import DeviceError, GenerationError
from tvm_attn.runtime.devices import cuda
from tvm_attn.runtime.dlpack import host_array, rows_view
from tvm_attn.runtime.logits import DeviceLogits
from tvm_attn.runtime.model import Model
from tvm_attn.runtime.stream import Stream

VOCABULARY = 2048


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> Model:
    return tvm_attn.load(demo_artifact, max_batch=4)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length, dtype=np.int32)


# --- logits out ---


def padded(rows: int, groups: int = 1, columns: int = 16) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(np.arange(groups * rows * columns, dtype=np.float32).reshape(groups, rows, columns))


@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (1, 5), (8, 16), (7, 13), (5, 1), (24, 3)])
def test_view_of_rows(rows: int, columns: int) -> None:
    tensor = padded(8, groups=3)
    view = torch.from_dlpack(rows_view(tensor, rows, columns))
    assert view.shape == (rows, columns)
    assert view.data_ptr() == tensor.data_ptr()
    np.testing.assert_array_equal(view.numpy(), tensor.numpy().reshape(24, 16)[:rows, :columns])
    # The tensor itself is unchanged.
    assert tuple(tensor.shape) == (3, 8, 16)


def test_view_keeps_the_memory() -> None:
    tensor = padded(8)
    expected = tensor.numpy()[0, :3, :5]
    view = torch.from_dlpack(rows_view(tensor, 3, 5))
    del tensor
    gc.collect()
    others = [padded(8) for _ in range(8)]
    for other in others:
        other.copyfrom(np.full((1, 8, 16), np.nan, np.float32))
    np.testing.assert_array_equal(view.numpy(), expected)


def test_logits_go_to_pytorch_without_a_copy(model: Model) -> None:
    prompts = [prompt(5), prompt(9, 1)]
    logits = model.engine.prefill(prompts, [0, 1])
    tensor = torch.from_dlpack(logits)
    assert tensor.shape == (2, VOCABULARY) and tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), logits.numpy())
    np.testing.assert_array_equal(tensor.argmax(-1).numpy(), logits.argmax())
    tensor[1, 7] = 1000.0
    assert logits.numpy()[1, 7] == 1000.0 and logits.argmax()[1] == 7
    np.testing.assert_array_equal(np.from_dlpack(logits), logits.numpy())
    decoded = model.engine.decode(np.int32([3]), np.int32([0]), np.int32([5]))
    np.testing.assert_array_equal(torch.from_dlpack(decoded).numpy(), decoded.numpy())


def test_logits_of_every_token(model: Model) -> None:
    prompts = [prompt(5), prompt(9, 1)]
    expected = np.concatenate(model.engine.logits(prompts, [0, 1]))
    logits = model.engine.device_logits(prompts, [0, 1])
    np.testing.assert_array_equal(torch.from_dlpack(logits).numpy(), expected)
    np.testing.assert_array_equal(logits.numpy(), expected)
    np.testing.assert_array_equal(logits.argmax(), expected.argmax(-1))


def test_logits_of_several_calls_are_several_tensors(model: Model) -> None:
    logits = model.engine.device_logits([prompt(200), prompt(200, 1)], [0, 1])
    assert logits.numpy().shape == (400, VOCABULARY)
    with pytest.raises(BufferError, match="are in 2 tensors, one per call: pass fewer tokens at a time"):
        torch.from_dlpack(logits)


# --- token ids in ---


class OnDevice:
    """A tensor on another device, as DLPack and PyTorch present it."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self.ndim = values, values.ndim

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __array__(self) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self) -> torch.Tensor:
        return self._values


class Exchange:
    """A tensor that offers DLPack and nothing else."""

    def __init__(self, values: np.ndarray, device: int) -> None:
        self._values, self._device = values, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return (self._device, 0)

    def __dlpack__(self, **options: Any) -> Any:
        return self._values.__dlpack__()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ids_of_pytorch(model: Model, dtype: torch.dtype) -> None:
    ids = torch.from_numpy(prompt(12) % 200).reshape(2, 6).to(dtype)
    expected = model.logits(ids.numpy().tolist())
    strided = torch.stack([ids, ids], -1).reshape(2, 12)[:, ::2]
    assert not strided.is_contiguous()
    for given in (ids, strided, OnDevice(ids), Exchange(ids.numpy(), 1), Exchange(ids.numpy(), 2)):
        np.testing.assert_array_equal(model.logits(given), expected)


def test_prompts_of_pytorch(model: Model) -> None:
    ids = torch.from_numpy(prompt(6))
    expected = model.generate(ids.tolist(), max_new_tokens=4)
    assert model.generate(ids, max_new_tokens=4) == expected
    assert model.generate([ids, ids], max_new_tokens=4) == [expected, expected]
    assert model.generate(torch.stack([ids, ids]), max_new_tokens=4) == [expected, expected]
    assert model.generate(OnDevice(ids), max_new_tokens=4) == expected


def test_ids_of_the_wrong_type(model: Model) -> None:
    with pytest.raises(GenerationError, match=r"float32 .* ids must be integers"):
        model.logits(torch.ones(1, 4))


def test_arrays_are_not_copied() -> None:
    values = np.arange(4)
    assert host_array(values) is values
    assert np.shares_memory(host_array(torch.from_numpy(values)), values)


# --- streams ---


class Device:
    """A CUDA device that records which stream was waited for."""

    def __init__(self, kind: int = 2) -> None:
        self._device, self._kind = tvm.runtime.device("cuda", 1), kind
        self.index, self.waits = 1, list[int]()

    def dlpack_device_type(self) -> int:
        return self._kind

    def sync(self, stream: int = 0) -> None:
        self.waits.append(stream)


def test_calls_go_to_the_stream_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[int] = []
    monkeypatch.setattr(cuda, "select", selected.append)
    device = tvm.runtime.device("cuda", 1)
    seen = Stream(device, 0x7F00).run(lambda *arguments: (tvm_ffi.get_raw_stream(device), arguments), 1, 2)
    assert seen == (0x7F00, (1, 2))
    assert tvm_ffi.get_raw_stream(device) == 0
    with tvm_ffi.use_raw_stream(device, 0x8000):
        assert Stream(device, None).run(lambda: tvm_ffi.get_raw_stream(device)) == 0x8000
        assert Stream(device, None).handle() == 0x8000
        assert Stream(device, 0).run(lambda: tvm_ffi.get_raw_stream(device)) == 0
    # A graph is captured and launched on the current device.
    assert selected == [1, 1, 1]


def test_a_call_on_another_stream_waits_for_one_that_was_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "select", lambda index: None)
    current = [0x8000]
    monkeypatch.setattr(Stream, "handle", lambda stream: current[0])
    device = Device()
    model = Stream(device, None)  # type: ignore[arg-type]
    model.run(lambda: None)
    model.leave_running()
    model.run(lambda: None)
    model.leave_running()
    assert device.waits == []
    current[0] = 0
    model.run(lambda: None)
    assert device.waits == [0x8000]
    model.run(lambda: None)
    assert device.waits == [0x8000]


def test_the_current_stream_goes_along_to_the_thread_that_calls() -> None:
    device = tvm.runtime.device("cuda", 1)
    seen: list[int] = []
    with tvm_ffi.use_raw_stream(device, 0x8000):
        carried = Stream(device, None).carry(lambda: seen.append(tvm_ffi.get_raw_stream(device)))
    thread = threading.Thread(target=carried)
    thread.start()
    thread.join()
    assert seen == [0x8000]


@contextmanager
def stream(handle: int, kind: int = 2) -> Iterator[tuple[Stream, list[int]]]:
    device = Device(kind)
    yield Stream(device, handle), device.waits  # type: ignore[arg-type]


def test_copies_wait_for_a_stream_of_its_own() -> None:
    """TVM copies on the default stream, which is ordered only with respect to itself."""
    for handle, waits in ((0x7F00, [0x7F00]), (0, [])):
        with stream(handle) as (own, waited):
            own.wait()
            assert waited == waits
    with stream(0, kind=7) as (vulkan, waited):
        vulkan.wait()
        assert waited == []


@pytest.mark.parametrize(
    ("handle", "consumer", "waits"),
    [
        (0, None, []),
        (0, 1, []),  # DLPack's name of the default stream
        (0, 2, [0]),
        (0, 0x7F00, [0]),
        (0, -1, []),
        (0x7F00, 0x7F00, []),
        (0x7F00, 0x8000, [0x7F00]),
        (0x7F00, None, [0x7F00]),
        (0x7F00, 1, [0x7F00]),
        (0x7F00, -1, []),
    ],
)
def test_handing_over_to_a_stream(handle: int, consumer: int | None, waits: list[int]) -> None:
    with stream(handle) as (own, waited):
        unused: Any = None
        logits = DeviceLogits(own, 5, unused, unused, [(padded(8), 3)])
        assert logits.__dlpack_device__() == (2, 1)
        logits.__dlpack__(stream=consumer)
        assert waited == waits


@pytest.mark.parametrize("given", [0, 5, -1, "0", 1.5])
def test_streams_are_for_cuda(demo_artifact: Path, given: Any) -> None:
    with pytest.raises(DeviceError, match=r"^stream is for devices with streams, and must be None for cpu$"):
        tvm_attn.load(demo_artifact, "cpu", stream=given)
