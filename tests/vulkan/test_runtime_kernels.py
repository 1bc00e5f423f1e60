"""Launches: a handwritten kernel, its order among others, large grids, many dispatches, several threads."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tvm_attn import vulkan as backend
from tvm_attn.errors import DeviceError


def upload(array: np.ndarray, device: Any) -> Any:
    import tvm

    return tvm.runtime.tensor(array, device)


def launch(axpy: Any, a: Any, b: Any, c: Any, scale: float) -> None:
    """c = a + scale * b"""
    count = a.shape[0]
    axpy(a, b, c, count, scale, -(-count // 64), 64)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 100_001])
def test_kernel(vulkan: Any, axpy: Any, count: int) -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(count, dtype=np.float32) for _ in range(2))
    out = upload(np.zeros(count, np.float32), vulkan)
    launch(axpy, upload(a, vulkan), upload(b, vulkan), out, 2.0)
    np.testing.assert_allclose(out.numpy(), a + 2 * b, rtol=1e-6)


def test_grid_beyond_the_device_limit_is_folded(vulkan: Any, axpy: Any) -> None:
    groups = backend.devices()[0]["limits"]["max_workgroup_count"][0] + 3
    if groups > 1 << 20:
        pytest.skip("the device's limit on a grid is too large for its memory")
    count = groups * 64 - 5
    a = np.arange(count, dtype=np.float32)
    out = upload(np.zeros(count, np.float32), vulkan)
    launch(axpy, upload(a, vulkan), upload(np.ones(count, np.float32), vulkan), out, 1.0)
    np.testing.assert_array_equal(out.numpy(), a + 1)


def test_empty_grid_does_nothing(vulkan: Any, axpy: Any) -> None:
    tensor = upload(np.ones(4, np.float32), vulkan)
    axpy(tensor, tensor, tensor, 4, 1.0, 0, 64)
    np.testing.assert_array_equal(tensor.numpy(), np.ones(4))


def test_dependent_dispatches_run_in_order(vulkan: Any, axpy: Any) -> None:
    """Read after write through one tensor, write after read through the other, far beyond one submission."""
    x = upload(np.zeros(1000, np.float32), vulkan)
    y = upload(np.zeros(1000, np.float32), vulkan)
    one = upload(np.ones(1000, np.float32), vulkan)
    for _ in range(500):
        launch(axpy, x, one, y, 1.0)
        launch(axpy, y, one, x, 1.0)
    np.testing.assert_array_equal(x.numpy(), np.full(1000, 1000.0))


def test_views_take_part_in_the_order(vulkan: Any, axpy: Any) -> None:
    """A dependency through two views of a tensor is a dependency through the tensor."""
    tensor = upload(np.ones(256, np.float32), vulkan)
    low, high = (tensor._create_view((128,), "float32", 512 * half) for half in (0, 1))
    for _ in range(10):
        launch(axpy, low, high, high, 1.0)
        launch(axpy, high, low, low, 1.0)
    expected = [1.0, 1.0]
    for _ in range(10):
        expected[1] += expected[0]
        expected[0] += expected[1]
    np.testing.assert_array_equal(tensor.numpy(), np.repeat(np.float32(expected), 128))


def test_independent_dispatches_need_no_barrier(vulkan: Any, axpy: Any) -> None:
    a, b = (upload(np.ones(64, np.float32), vulkan) for _ in range(2))
    outputs = [upload(np.zeros(64, np.float32), vulkan) for _ in range(20)]
    launch(axpy, a, b, outputs[0], 1.0)  # everything was uploaded just before: this one waits for that
    before = backend.statistics()["barriers"]
    for out in outputs[1:]:
        launch(axpy, a, b, out, 1.0)
    assert backend.statistics()["barriers"] == before
    launch(axpy, a, outputs[3], outputs[4], 1.0)
    assert backend.statistics()["barriers"] == before + 1
    assert outputs[4].numpy()[0] == 3


def test_ten_thousand_dispatches_leak_nothing_and_need_few_submissions(vulkan: Any, axpy: Any) -> None:
    one = upload(np.ones(64, np.float32), vulkan)
    total = upload(np.zeros(64, np.float32), vulkan)
    before = backend.statistics()
    for _ in range(10_000):
        out = upload_free(total, vulkan)
        launch(axpy, total, one, out, 1.0)
        launch(axpy, out, one, total, 0.0)
        del out
    np.testing.assert_array_equal(total.numpy(), np.full(64, 10_000.0))
    after = backend.statistics()
    for key in ("allocations", "allocated_bytes", "reserved_bytes"):
        assert after[key] == before[key]
    assert after["operations"] - before["operations"] == 20_001
    assert after["submissions"] - before["submissions"] < 20_000 / 50


def upload_free(like: Any, device: Any) -> Any:
    """A tensor of the same shape that nothing was copied into."""
    import tvm

    return tvm.runtime.empty(like.shape, like.dtype, device)


def test_host_does_not_wait_for_the_device(vulkan: Any, axpy: Any) -> None:
    """Few submissions, none of them waited for: what was recorded last is still in flight."""
    a, b, out = (upload(np.ones(64, np.float32), vulkan) for _ in range(3))
    vulkan.sync()
    before = backend.statistics()
    for _ in range(3):
        launch(axpy, a, b, out, 1.0)
    assert backend.statistics()["submissions"] == before["submissions"]  # the first batch is four operations long
    vulkan.sync()
    assert backend.statistics()["submissions"] == before["submissions"] + 1


def test_threads_launch_at_the_same_time(vulkan: Any, axpy: Any) -> None:
    results: dict[int, np.ndarray] = {}

    def work(seed: int) -> None:
        one = upload(np.ones(1000, np.float32), vulkan)
        x = upload(np.full(1000, seed, np.float32), vulkan)
        y = upload(np.zeros(1000, np.float32), vulkan)
        for _ in range(200):
            launch(axpy, x, one, y, 1.0)
            launch(axpy, y, one, x, 1.0)
        results[seed] = x.numpy()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for seed in range(4):
        np.testing.assert_array_equal(results[seed], np.full(1000, seed + 400.0))


def test_kernel_outlives_its_last_call(
    vulkan: Any, create_module: Callable[[bytes], Any], pack: Callable[..., bytes], axpy_record: dict[str, Any]
) -> None:
    """A module may be dropped while its kernel is in flight."""
    a, b = (upload(np.ones(1 << 20, np.float32), vulkan) for _ in range(2))
    for _ in range(20):
        out = upload_free(a, vulkan)
        module = create_module(pack(axpy_record))
        launch(module["axpy"], a, b, out, 2.0)
        del module
        assert (out.numpy() == 3).all()


def test_arguments_that_do_not_fit_are_refused(vulkan: Any, axpy: Any) -> None:
    tensor = upload(np.ones(64, np.float32), vulkan)
    with pytest.raises(TypeError, match="takes 7 arguments, not 3"):
        axpy(tensor, tensor, tensor)
    with pytest.raises(DeviceError, match="kernel axpy: argument 1 is no memory of the device"):
        import tvm

        axpy(tensor, tvm.runtime.tensor(np.ones(64, np.float32)), tensor, 64, 1.0, 1, 64)
    with pytest.raises(ValueError, match="launch parameter 0 is -1"):
        axpy(tensor, tensor, tensor, 64, 1.0, -1, 64)
    with pytest.raises(ValueError, match="another workgroup size than 32"):
        axpy(tensor, tensor, tensor, 64, 1.0, 1, 32)
