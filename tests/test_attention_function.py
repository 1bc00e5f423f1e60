"""`tvm_attn.attention` and `attention_weights` against float64 and PyTorch, on every device that is here.

The reference is written from the definition. What the kernels do with sizes and masks is tested in `tests/kernels`.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from torch.nn.functional import scaled_dot_product_attention

import tvm_attn
from tests.kernels.devices import vulkan_devices
from tvm_attn import attention, attention_function, attention_weights, targets
from tvm_attn.compiler import kernel_cache
from tvm_attn.errors import AttentionError, CompileError, DeviceError
from tvm_attn.kernels import AttentionOperator
from tvm_attn.kernels.base import shape_of
from tvm_attn.schedule import Record, template_for
from tvm_attn.schedule.records import user_folder
from tvm_attn.storage import numpy_dtype

DEVICES = ("cpu", *(device.name for device in vulkan_devices()))
# Normalised mean squared errors: a float32 sum of 64 products and a softmax are about 1e-7 each; rounding the result to
# 11 or 8 bits, and as much again for the operands.
BOUNDS = {"float32": 1e-12, "float16": 2.0**-21, "bfloat16": 2.0**-15}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder for compiled kernels."""
    place = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place))
        yield place / "tvm-attn" / "kernels"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process that has compiled nothing, on a machine that has not either; the folder of compiled kernels."""
    monkeypatch.setattr(kernel_cache, "_loaded", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tvm-attn" / "kernels"


def random(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(numpy_dtype(dtype))


def reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    starts: Any = 0,
    lengths: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and weights in float64 of q (b, H, n, D), k (b, G, s, D), v (b, G, s, F)."""
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    (b, heads, n, width), (_, key_heads, s, _) = q.shape, k.shape
    k, v = (np.nan_to_num(np.repeat(array, heads // key_heads, axis=1)) for array in (k, v))
    scores = np.einsum("bhnd,bhsd->bhns", q, k) * (width**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    position = np.broadcast_to(starts, b)[:, None, None, None] + np.arange(n)[:, None]
    key = np.arange(s)
    sees = key < np.broadcast_to(s if lengths is None else lengths, b)[:, None, None, None]
    sees = sees & (position >= -(10**9))
    if causal:
        sees = sees & (key <= position)
    if window[0] >= 0:
        sees = sees & (key >= position - window[0])
    if window[1] >= 0:
        sees = sees & (key <= position + window[1])
    if mask is not None and mask.dtype == bool:
        sees = sees & mask
    elif mask is not None:
        scores = scores + mask.astype(np.float64)
    scores = np.where(sees, scores, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e300))
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhns,bhsf->bhnf", weights, v), weights


def assert_close(result: np.ndarray, expected: np.ndarray, bound: float = BOUNDS["float32"]) -> None:
    assert result.shape == expected.shape
    difference = result.astype(np.float64) - expected
    assert not np.isnan(difference).any()
    assert np.square(difference).sum() <= bound * np.square(expected).sum()


MASK = np.random.default_rng(5).random((2, 4, 19, 37)) < 0.7
MASK[:, :, 3] = False  # this query sees nothing
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, aligned at the end": {"causal": True, "query_start": 18},
    "causal, each sequence by itself": {"causal": True, "query_start": [18, -4], "key_lengths": [37, 15]},
    "keys that do not exist": {"key_lengths": (5, 0)},
    "window": {"window": (4, 2), "query_start": 9},
    "causal window": {"causal": True, "window": (6, -1), "query_start": np.array(18)},
    "soft cap and scale": {"softcap": 1.5, "scale": -0.3},
    "boolean mask": {"mask": MASK},
    "one mask for all": {"mask": MASK[0, 0]},
    "mask by sequence": {"mask": MASK[:, :1, :1]},
    "mask by query": {"mask": MASK[:, :, :, :1]},
    "added mask": {"mask": np.where(MASK, random(2, 4, 19, 37), -np.inf).astype(np.float32)},
    "everything": {"mask": MASK[:1], "causal": True, "window": (12, 5), "softcap": 4.0, "query_start": [18, 11]},
}


def expected_of(operands: tuple[np.ndarray, ...], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    names = {"query_start": "starts", "key_lengths": "lengths"}
    return reference(*operands, **{names.get(name, name): value for name, value in options.items()})


def few(name: str, device: str) -> bool:
    """Other devices than the processor take some of the options: the kernels' own tests have all of them."""
    return device == "cpu" or name in ("causal, each sequence by itself", "added mask", "everything")


@pytest.mark.parametrize(("name", "device"), [(name, d) for d in DEVICES for name in OPTIONS if few(name, d)])
def test_options(name: str, device: str) -> None:
    operands = random(2, 4, 19, 16), random(2, 2, 37, 16), random(2, 2, 37, 24)
    expected, weights = expected_of(operands, OPTIONS[name])
    assert_close(attention(*operands, device=device, **OPTIONS[name]), expected)
    assert_close(attention_weights(*operands[:2], device=device, **OPTIONS[name]), weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounded_dtypes(dtype: str, device: str) -> None:
    operands = random(2, 4, 19, 16, dtype=dtype), random(2, 2, 37, 16, dtype=dtype), random(2, 2, 37, 8, dtype=dtype)
    mask = random(19, 37, dtype=dtype)
    result = attention(*operands, causal=True, query_start=18, mask=mask, device=device)
    assert result.dtype == numpy_dtype(dtype)
    assert_close(result, reference(*operands, mask=mask, causal=True, starts=18)[0], BOUNDS[dtype])
    float_mask = mask.astype(np.float32)
    np.testing.assert_array_equal(attention(*operands, mask=float_mask), attention(*operands, mask=mask))


@pytest.mark.parametrize("stage", ["raw", "capped", "biased", "weights"])
def test_stages(stage: str) -> None:
    q, k = random(1, 2, 5, 8), random(1, 2, 7, 8)
    mask = np.where(MASK[0, 0, :5, :7], 0.5, -np.inf).astype(np.float32)
    raw = np.einsum("bhnd,bhsd->bhns", q.astype(np.float64), k.astype(np.float64)) * 8**-0.5
    capped = 2.0 * np.tanh(raw / 2.0)
    biased = capped + mask
    expected = {"raw": raw, "capped": capped, "biased": biased}.get(stage)
    if expected is None:
        expected = reference(q, k, k, mask=mask, softcap=2.0)[1]
    result = attention_weights(q, k, stage=stage, mask=mask, softcap=2.0)
    np.testing.assert_array_equal(np.isneginf(result), np.isneginf(expected))
    finite = np.isfinite(expected)
    assert_close(result[finite], expected[finite])


@pytest.mark.parametrize("shape", [(9, 16), (3, 9, 16), (2, 3, 9, 16), (2, 1, 3, 9, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_ranks_as_in_pytorch(shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = (torch.from_numpy(random(*shape, seed=seed)) for seed in range(3))
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    result = attention(q, k, v, causal=causal)
    assert isinstance(result, torch.Tensor)
    assert_close(result.numpy(), expected.numpy())


MASK_SHAPES = [(1,), (7,), (9, 7), (9, 1), (3, 9, 7), (3, 1, 7), (2, 1, 1, 1, 7), (1, 5, 1, 9, 7), (2, 5, 3, 9, 7)]


@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_broadcast_as_in_pytorch(shape: tuple[int, ...], boolean: bool) -> None:
    q, k, v = (torch.from_numpy(random(2, 5, 3, length, 4)) for length in (9, 7, 7))
    mask = torch.from_numpy(random(*shape))
    if boolean:
        mask = mask > -0.5
        mask[..., 0] = True  # PyTorch's versions differ in rows that see nothing
    expected = scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask if boolean else mask.double()
    )
    assert_close(attention(q, k, v, mask=mask).numpy(), expected.numpy())


def test_grouped_heads_as_in_pytorch() -> None:
    q, k, v = (torch.from_numpy(random(2, heads, 11, 8)) for heads in (6, 2, 2))
    expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    assert_close(attention(q, k, v, enable_gqa=True).numpy(), expected.numpy())


def test_kinds_of_tensors() -> None:
    arrays = random(1, 2, 5, 8), random(1, 2, 6, 8, seed=1), random(1, 2, 6, 8, seed=2)
    expected = attention(*arrays)
    assert type(expected) is np.ndarray
    as_tvm = attention(*map(tvm.runtime.tensor, arrays))
    np.testing.assert_array_equal(as_tvm.numpy(), expected)
    as_torch = attention(*map(torch.from_numpy, arrays))
    assert isinstance(as_torch, torch.Tensor)
    np.testing.assert_array_equal(as_torch.numpy(), expected)
    # NumPy's DLPack knows no arrays that may not be written, and kernels need their elements side by side.
    awkward = [np.ascontiguousarray(array.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2) for array in arrays]
    for array in awkward:
        array.flags.writeable = False
    np.testing.assert_array_equal(attention(*awkward), expected)
    strided = [torch.from_numpy(array).transpose(1, 2).contiguous().transpose(1, 2) for array in arrays]
    np.testing.assert_array_equal(attention(*strided).numpy(), expected)
    learned = torch.from_numpy(arrays[0]).requires_grad_()
    assert not attention(learned, *map(torch.from_numpy, arrays[1:])).requires_grad
    # At an address that is a multiple of 4 only.
    memory = np.empty(arrays[0].nbytes + 4, np.uint8)[4:].view(np.float32).reshape(arrays[0].shape)
    memory[:] = arrays[0]
    np.testing.assert_array_equal(attention(memory, *arrays[1:]), expected)
    for array, before in zip(arrays, (random(1, 2, 5, 8), random(1, 2, 6, 8, seed=1)), strict=False):
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_tensors_on_a_device(device: str) -> None:
    arrays = random(1, 2, 5, 8), random(1, 2, 6, 8, seed=1), random(1, 2, 6, 8, seed=2)
    expected = reference(*arrays)[0]
    place = tvm.runtime.device(device)
    tensors = [tvm.runtime.tensor(array, place) for array in arrays]
    result = attention(*tensors)
    assert result.device == place
    assert_close(result.numpy(), expected)
    mask = np.ones((1, 2, 1, 1), bool)  # on the host, and not of the kernel's shape
    assert_close(attention(*tensors, mask=mask).numpy(), expected)
    as_torch = attention(*map(torch.from_numpy, arrays), device=device)
    assert_close(as_torch.numpy(), expected)
    half = attention(*(torch.from_numpy(array).half() for array in arrays), device=device)
    assert half.dtype == torch.float16
    host = attention(*map(tvm.runtime.tensor, arrays), device=device)
    assert host.device == tvm.cpu()
    with pytest.raises(AttentionError, match="bring them to one device"):
        attention(arrays[0], *tensors[1:])
    with pytest.raises(AttentionError, match="not on cpu"):
        attention(*tensors, device="cpu")


def test_extreme_values() -> None:
    q, k, v = random(1, 1, 8, 16) * 3e3, random(1, 1, 40, 16) * 3e3, random(1, 1, 40, 16)
    assert_close(attention(q, k, v), reference(q, k, v)[0], 1e-4)  # float32 resolves scores of order 1e7 to about 1
    lowest = np.full((8, 40), np.finfo(np.float32).min, np.float32)
    equal = attention(q / 3e3, k / 3e3, v, mask=lowest)
    assert_close(equal, np.broadcast_to(v.astype(np.float64).mean(2, keepdims=True), equal.shape))
    nowhere = attention(q, k, v, mask=np.zeros((8, 40), bool))
    np.testing.assert_array_equal(nowhere, np.zeros_like(nowhere))
    k[:, :, 30:] = v[:, :, 30:] = np.nan
    assert_close(attention(q / 3e3, k, v, key_lengths=30), reference(q / 3e3, k[:, :, :30], v[:, :, :30])[0], 1e-4)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_empty_tensors(sizes: tuple[int, ...]) -> None:
    b, heads, n, s = sizes
    for kind in (np.asarray, torch.from_numpy):
        q, k, v = (kind(random(b, heads, length, width)) for length, width in ((n, 8), (s, 8), (s, 6)))
        result = np.asarray(attention(q, k, v))
        np.testing.assert_array_equal(result, np.zeros((b, heads, n, 6), np.float32))
        assert tuple(attention_weights(q, k).shape) == (b, heads, n, s)


Q, K = random(2, 4, 5, 8), random(2, 2, 6, 8)
WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "rank": ((Q, K[0], K[0]), {}, "same number of dimensions"),
    "one dimension": ((Q[0, 0, 0],) * 3, {}, "at least 2"),
    "width": ((Q, K[..., :4], K), {}, r"give q \(\.\.\., H, n, D\)"),
    "keys and values": ((Q, K, K[:, :, :3]), {}, r"give q \(\.\.\., H, n, D\)"),
    "no width": ((Q[..., :0], K[..., :0], K), {}, r"give q \(\.\.\., H, n, D\)"),
    "sequences": ((Q[:1], K, K), {}, "must agree"),
    "heads": ((Q[:, :3], K, K), {}, "divide the heads"),
    "no groups": ((Q, K, K), {"enable_gqa": False}, "4 heads and 2 key heads need enable_gqa=True"),
    "float64": ((Q.astype(np.float64), K, K), {}, "float64 does not fit; use float32"),
    "several dtypes": ((Q.astype(np.float16), K, K), {}, "q float16, k float32, v float32: all must have one dtype"),
    "integers": ((torch.ones(2, 2, dtype=torch.int32),) * 3, {}, "all must have one dtype"),
    "a list": (([[1.0]], K, K), {}, r"q is \[\[1.0\]\]; give an array"),
    "nothing": ((None, K, K), {}, "q is None"),
    "mask of another size": ((Q, K, K), {"mask": np.ones((5, 5), bool)}, r"mask \(5, 5\) does not broadcast"),
    "mask of a higher rank": ((Q, K, K), {"mask": np.ones((1, 1, 1, 5, 6), bool)}, "does not broadcast"),
    "mask of integers": ((Q, K, K), {"mask": torch.ones(5, 6, dtype=torch.int8)}, "the mask is int8; use bool"),
    "window": ((Q, K, K), {"window": 3}, "window is 3; give two integers"),
    "window of floats": ((Q, K, K), {"window": (1.0, 2)}, "give two integers"),
    "window below": ((Q, K, K), {"window": (-2, 2)}, "give two integers"),
    "scale": ((Q, K, K), {"scale": float("nan")}, "scale is nan; give a finite number"),
    "scale as text": ((Q, K, K), {"scale": "1"}, "scale is '1'"),
    "soft cap": ((Q, K, K), {"softcap": -1.0}, "softcap is -1.0; give a finite number from 0 on"),
    "lengths": ((Q, K, K), {"key_lengths": 7}, "key_lengths is 7; give integers from 0 to 6"),
    "number of lengths": ((Q, K, K), {"key_lengths": [1, 2, 3]}, "give an integer, or 2, one for each sequence"),
    "start": ((Q, K, K), {"query_start": 0.5}, "query_start is 0.5; give an integer"),
    "far start": ((Q, K, K), {"query_start": 2**40}, "give integers from"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    operands, options, message = WRONG[name]
    with pytest.raises(AttentionError, match=message) as caught:
        attention(*operands, **options)
    assert "\n" not in str(caught.value)


def test_unknown_stages_and_devices() -> None:
    with pytest.raises(AttentionError, match=r"unknown stage 'softmax'; use one of raw, capped, biased, weights"):
        attention_weights(Q, K, stage="softmax")
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        attention(Q, K, K, device="gpu")
    with pytest.raises(DeviceError, match="device vulkan:99"):
        attention(Q, K, K, device="vulkan:99")
    with pytest.raises(DeviceError, match="threads"):
        attention(Q, K, K, threads=0)


def test_tensors_too_large_for_the_kernels() -> None:
    one = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (1, 1, 2**16, 8), (0, 0, 0, 0))
    with pytest.raises(AttentionError, match=r"the result \(1, 1, 65536, 65536\) has 2\*\*31 or more elements"):
        attention_weights(one, one)


# --- the cache ---


def test_another_process_compiles_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = attention(Q, K, K, scale=0.25)
    (library,) = fresh.iterdir()
    assert fresh.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(kernel_cache, "_compile", lambda *_: pytest.fail("compiled again"))
    monkeypatch.setattr(kernel_cache, "_loaded", {})
    np.testing.assert_array_equal(attention(Q, K, K, scale=0.25), expected)
    assert list(fresh.iterdir()) == [library]


@pytest.mark.parametrize("damage", ["shorter", "changed", "empty", "link to nothing", "folder"])
def test_damaged_libraries_are_not_loaded(damage: str, tmp_path: Path) -> None:
    content = b"what the linker wrote"
    kernel_cache._keep(tmp_path, "key", content)
    assert kernel_cache._read(tmp_path, "key") == content
    assert kernel_cache._read(tmp_path, "other") is None
    (library,) = tmp_path.iterdir()
    library.unlink()
    if damage == "link to nothing":
        library.symlink_to("nowhere")
    elif damage == "folder":
        library.mkdir()
    else:
        library.write_bytes({"shorter": content[:-1], "changed": content[:-1] + b"?", "empty": b""}[damage])
    assert kernel_cache._read(tmp_path, "key") is None
    if damage != "folder":
        assert not library.is_symlink() and not library.exists()
        kernel_cache._keep(tmp_path, "key", content)
        assert kernel_cache._read(tmp_path, "key") == content
    kernel_cache._keep(tmp_path, "key", content)  # in the place of a folder: it is left out


def test_the_key_holds_what_the_code_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = AttentionOperator(2, 2, 8, 8, "float32", 0.125)
    target = targets.detect_cpu()
    keys = {kernel_cache._key(kernel, target), kernel_cache._key(replace(kernel, causal=True), target)}
    keys.add(kernel_cache._key(kernel, replace(target, tile_rows=target.tile_rows + 1)))
    assert kernel_cache._key(kernel, replace(target, description="other words")) in keys
    monkeypatch.setattr(tvm_attn, "__version__", "another", raising=False)
    keys.add(kernel_cache._key(kernel, target))
    monkeypatch.setattr(kernel_cache, "_sources", lambda: "other sources")
    keys.add(kernel_cache._key(kernel, target))
    monkeypatch.setenv("CXX", "another")
    keys.add(kernel_cache._key(kernel, target))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    template = template_for(kernel, target)
    record = Record(template.name, template.version, shape_of(kernel), {}, 1.0, None, "0", "2026-01-01")
    folder = user_folder() / target.name
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text(replace(record, version=template.version + 1).to_line())
    assert kernel_cache._key(kernel, target) in keys  # it is not the kernel's
    (folder / "b.jsonl").write_text(record.to_line())
    keys.add(kernel_cache._key(kernel, target))
    assert len(keys) == 7


def test_a_folder_that_others_can_write_to_is_not_used(fresh: Path) -> None:
    fresh.mkdir(parents=True)
    fresh.chmod(0o777)
    assert attention(Q, K, K).shape == Q.shape
    assert list(fresh.iterdir()) == []


def test_without_a_folder(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert attention(Q, K, K).shape == Q.shape


def test_the_folder_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "MOST_FILES", 2)
    for number, name in enumerate(("first", "second", "third")):
        kernel_cache._keep(tmp_path, name, name.encode())
        for file in tmp_path.glob(f"{name}-*"):
            os.utime(file, (number, number))
    assert sorted(file.name.split("-")[0] for file in tmp_path.iterdir()) == ["second", "third"]


def test_threads_compile_a_kernel_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_kernel, results = [], kernel_cache._compile, []

    def count(*arguments: Any) -> bytes:
        compiled.append(arguments)
        return compile_kernel(*arguments)

    monkeypatch.setattr(kernel_cache, "_compile", count)
    threads = [threading.Thread(target=lambda: results.append(attention(Q, K, K, causal=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1
    for result in results:
        np.testing.assert_array_equal(result, attention(Q, K, K, causal=True))
    assert len(results) == 4


def test_slow_compilation_is_reported(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(kernel_cache, "_QUIET_SECONDS", 0.0)
    attention(Q, K, K, scale=0.25, progress=said.append)
    assert said == [
        f"compiling attention_operator 4x8 for {attention_function._target(tvm.cpu(), 'float32').name} (once)"
    ]
    attention(Q, K, K, scale=0.25, progress=said.append)
    assert len(said) == 1


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
        attention(Q, K, K)


@pytest.mark.parametrize("function", ["attention", "attention_weights"])
def test_only_the_runtime(function: str) -> None:
    code = f"import tvm_attn; tvm_attn.{function}(*[None] * 3)"
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("tvm_attn.errors.CompileError: this needs TVM's compiler")


def test_a_foreign_tensor() -> None:
    class Foreign:
        """A tensor of a library that this package does not know."""

        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: Any) -> Any:
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.tensor.__dlpack_device__()

    result = attention(*(Foreign(tvm.runtime.tensor(array)) for array in (Q, K, K)))
    assert isinstance(result, tvm_ffi.Tensor)
    np.testing.assert_array_equal(result.numpy(), attention(Q, K, K))
