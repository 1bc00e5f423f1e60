"""Device memory: tensors, copies, views, accounting, and what happens when it runs out."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tvm_attn import vulkan as backend
from tvm_attn.errors import DeviceError

UPLOAD_RING = 16 << 20  # UploadRing::kSize in src/staging.h


def upload(array: np.ndarray, device: Any) -> Any:
    import tvm

    return tvm.runtime.tensor(array, device)


def empty(nbytes: int, device: Any) -> Any:
    import tvm

    return tvm.runtime.empty((nbytes,), "uint8", device)


def tvm_cpu() -> Any:
    import tvm

    return tvm.cpu()


def random_bytes(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, count, dtype=np.uint8)


@pytest.fixture
def unchanged_allocations(vulkan: Any) -> Iterator[None]:
    """Fails a test after which the device holds more, or less, than before."""
    gc.collect()
    before = backend.statistics()
    yield
    gc.collect()
    after = backend.statistics()
    assert (after["allocations"], after["allocated_bytes"]) == (before["allocations"], before["allocated_bytes"])


@pytest.mark.parametrize("count", [1, 3, 255, 256, 257, 4097, (4 << 20) + 1, UPLOAD_RING - 1, 2 * UPLOAD_RING + 5])
def test_host_to_device_and_back(vulkan: Any, unchanged_allocations: None, count: int) -> None:
    data = random_bytes(count)
    np.testing.assert_array_equal(upload(data, vulkan).numpy(), data)


def test_uploads_wait_for_nothing_and_everything_else_does(vulkan: Any, axpy: Any) -> None:
    """TVM waits after each upload; by then the data is in the staging ring, and only a wait by the caller submits."""
    vulkan.sync()
    ones = np.ones(64, np.float32)
    before = backend.statistics()
    tensor = upload(ones, vulkan)
    uploaded = backend.statistics()
    assert (uploaded["operations"], uploaded["submissions"]) == (before["operations"] + 1, before["submissions"])
    vulkan.sync()
    assert backend.statistics()["submissions"] == before["submissions"] + 1
    tensor.copyfrom(ones)
    axpy(tensor, tensor, tensor, 64, 1.0, 1, 64)
    vulkan.sync()
    assert backend.statistics()["submissions"] == before["submissions"] + 2
    host = upload(ones, tvm_cpu())
    host.copyto(tensor)  # not followed by a wait of TVM's own
    vulkan.sync()
    assert backend.statistics()["submissions"] == before["submissions"] + 3


def test_tensors_do_not_share_memory(vulkan: Any, unchanged_allocations: None) -> None:
    arrays = [random_bytes(count) for count in (1, 1, 100, 255, 256, 257, 70_000_000, 3)]
    tensors = [upload(array, vulkan) for array in arrays]
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("count", [1, 7, 100_003, UPLOAD_RING + 1])
def test_copy_inside_the_device(vulkan: Any, unchanged_allocations: None, count: int) -> None:
    data = random_bytes(count)
    source = upload(data, vulkan)
    target = empty(count, vulkan)
    source.copyto(target)
    np.testing.assert_array_equal(target.numpy(), data)


def test_zero_sized_tensor(vulkan: Any, unchanged_allocations: None) -> None:
    assert upload(np.zeros((0, 3), np.float32), vulkan).numpy().shape == (0, 3)


def test_views_at_odd_offsets_are_copied_exactly(vulkan: Any, unchanged_allocations: None) -> None:
    data = random_bytes(1000)
    tensor = upload(data, vulkan)
    for start, length in ((0, 1), (1, 999), (13, 77), (999, 1)):
        view = tensor._create_view((length,), "uint8", start)
        np.testing.assert_array_equal(view.numpy(), data[start : start + length])
        view.copyfrom(np.full(length, start % 256, np.uint8))
        data[start : start + length] = start % 256
        np.testing.assert_array_equal(tensor.numpy(), data)


def test_overlapping_copy_is_refused(vulkan: Any) -> None:
    tensor = upload(random_bytes(100), vulkan)
    with pytest.raises(DeviceError, match="overlapping"):
        tensor._create_view((50,), "uint8", 0).copyto(tensor._create_view((50,), "uint8", 10))


def test_freed_memory_is_used_again(vulkan: Any, unchanged_allocations: None) -> None:
    """A loop that makes and drops tensors takes no more from the driver than its first rounds did."""
    for _ in range(3):
        upload(random_bytes(1 << 20), vulkan).numpy()
    reserved = backend.statistics()["reserved_bytes"]
    for _ in range(200):
        upload(random_bytes(1 << 20), vulkan)
    assert backend.statistics()["reserved_bytes"] == reserved


def test_memory_handed_out_again_is_not_overwritten_by_earlier_work(vulkan: Any, axpy: Any) -> None:
    """A tensor is dropped while a kernel that writes it is in flight; its successor's data must win."""
    count = 1 << 20
    a = upload(np.ones(count, np.float32), vulkan)
    for turn in range(20):
        dropped = empty(4 * count, vulkan)
        axpy(a, a, dropped, count, 1.0, count // 64, 64)
        del dropped
        data = np.full(count, turn, np.float32)
        np.testing.assert_array_equal(upload(data, vulkan).numpy(), data)


def test_large_blocks_go_back_to_the_driver(vulkan: Any) -> None:
    before = backend.statistics()["reserved_bytes"]
    tensor = empty(100 << 20, vulkan)
    assert backend.statistics()["reserved_bytes"] >= before + (100 << 20)
    del tensor
    vulkan.sync()
    assert backend.statistics()["reserved_bytes"] <= before


def test_tensor_beyond_a_single_buffer_is_refused(vulkan: Any) -> None:
    limits = backend.devices()[0]["limits"]
    too_large = min(limits["max_allocation_bytes"], limits["max_buffer_bytes"]) + 1
    with pytest.raises(DeviceError, match=r"tensor of \d+\.\d MiB does not fit into one buffer of .+ ends at"):
        empty(too_large, vulkan)


def test_out_of_memory_says_how_much_and_leaves_the_device_usable(vulkan: Any, unchanged_allocations: None) -> None:
    limits = backend.devices()[0]["limits"]
    part = min(limits["max_allocation_bytes"], limits["memory_bytes"] // 3 + 1)
    held = []
    with pytest.raises(DeviceError, match=r"out of memory on .+: \d.* MiB asked, \d.* MiB in use .* MiB in all"):
        for _ in range(limits["memory_bytes"] // part + 1):
            held.append(empty(part, vulkan))
    assert held
    held.clear()
    data = random_bytes(1000)
    np.testing.assert_array_equal(upload(data, vulkan).numpy(), data)


def test_threads_copy_at_the_same_time(vulkan: Any, unchanged_allocations: None) -> None:
    failures: list[str] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(30):
            data = random.integers(0, 256, int(random.integers(1, 3 << 20)), dtype=np.uint8)
            copy = empty(data.size, vulkan)
            upload(data, vulkan).copyto(copy)
            if not np.array_equal(copy.numpy(), data):
                failures.append(f"thread {seed}")

    run_threads(work, 4)
    assert not failures


def run_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
