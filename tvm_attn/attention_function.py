"""`tvm_attn.attention` and `tvm_attn.attention_weights`: attention of every kind as a function of tensors.

The meaning is that of `torch.nn.functional.scaled_dot_product_attention`, with what the operator Attention of ai.onnx
adds: soft caps, windows, the position of the queries among the keys, keys that do not exist. Scores and sums are
float32 for every dtype. A query that sees no key gives zeros.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tvm
import tvm_ffi

from tvm_attn import targets
from tvm_attn.compiler.kernel_cache import compiled_kernel
from tvm_attn.errors import AttentionError, DeviceError, one_line, shorten
from tvm_attn.kernels import AttentionOperator, AttentionScores
from tvm_attn.kernels.attention_operator import BOOLEAN, STAGES
from tvm_attn.runtime.device import parse_device
from tvm_attn.runtime.devices import class_of, device_class
from tvm_attn.runtime.machine import thread_count
from tvm_attn.storage import DTYPES

_MOST_ELEMENTS = 2**31 - 1
"""Elements of a tensor: kernels index with 32 bits."""
_FAR = 1 << 30
"""Positions and windows stay below this, so that sums of two of them fit 32 bits."""

Integers = int | Sequence[int] | np.ndarray


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    query_start: Integers = 0,
    key_lengths: Integers | None = None,
    enable_gqa: bool = True,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """softmax(cap(scale q k^T) + mask) v, by a kernel that is compiled when it is first needed.

    Args:
        q: queries (..., H, n, D), or (..., n, D) with less than four dimensions; float32, float16 or bfloat16. NumPy
            arrays, PyTorch tensors, or anything else with DLPack; contiguous ones are read in place.
        k: keys (..., G, s, D), G a divisor of H: grouped-query attention if it is smaller (Ainslie et al., 2023).
        v: values (..., G, s, F).
        mask: bool, true where a key takes part, or floating-point numbers to add to the scores; it broadcasts to
            (..., H, n, s).
        causal: the query at position p sees the keys up to p only.
        scale: factor of the scores; default 1 / sqrt(D).
        window: how many keys before and after its own position a query sees, -1 for all.
        softcap: scores become softcap * tanh(score / softcap); 0 leaves them.
        query_start: position of the first query among the keys, for all sequences or for each. 0 aligns the first
            query with the first key, as PyTorch does; s - n aligns the last ones, as after cached keys.
        key_lengths: how many keys exist, for all sequences or for each; default s. What lies beyond is not read.
        enable_gqa: False refuses G < H, as PyTorch does unless it is asked.
        device: where to compute, e.g. "vulkan:0", if the tensors are in the host's memory; default: where they are.
        threads: threads of the processor; default all cores.
        progress: called with a line if compiling takes long; by default it is printed on stderr.

    Returns:
        (..., H, n, F), of the kind (NumPy, PyTorch, else a TVM tensor), the dtype and the device of q. It has no
        gradient.

    Raises:
        AttentionError: shapes, dtypes or options do not fit.
        DeviceError: the device is absent or lacks something.
        CompileError: TVM's compiler or a tool is missing, or fails.
    """
    call = _Call(
        {"q": q, "k": k, "v": v},
        mask,
        causal,
        scale,
        window,
        softcap,
        query_start,
        key_lengths,
        enable_gqa,
        device,
        threads,
        progress,
    )
    return call.run(None)


def attention_weights(
    q: Any,
    k: Any,
    *,
    stage: str = "weights",
    mask: Any = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    query_start: Integers = 0,
    key_lengths: Integers | None = None,
    enable_gqa: bool = True,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """The scores of `attention`, or their softmax.

    Args:
        q, k, mask, causal, scale, window, softcap, query_start, key_lengths, enable_gqa, device, threads, progress: as
            in `attention`.
        stage: "raw", scale q k^T; "capped", after the soft cap; "biased", with the mask too and minus infinity for
            keys that take no part; "weights", their softmax. These are the modes 0 to 3 of `qk_matmul_output_mode` of
            the operator Attention. The first two hold all products, also those of keys that take no part.

    Returns:
        (..., H, n, s) float32, otherwise as `attention`.

    Raises:
        AttentionError, DeviceError, CompileError: as `attention`.
    """
    if stage not in STAGES:
        raise AttentionError(f"unknown stage {shorten(stage)}; use one of {', '.join(STAGES)}")
    call = _Call(
        {"q": q, "k": k},
        mask,
        causal,
        scale,
        window,
        softcap,
        query_start,
        key_lengths,
        enable_gqa,
        device,
        threads,
        progress,
    )
    return call.run(stage)


class _Sizes(NamedTuple):
    """Sizes of a call, by the letters of `AttentionOperator`; `lead` are the dimensions before (n, D)."""

    lead: tuple[int, ...]
    b: int
    heads: int
    key_heads: int
    n: int
    s: int
    head_dim: int
    value_dim: int


class _Call:
    """The checked arguments of a call, as tensors of its device."""

    def __init__(
        self,
        given: dict[str, Any],
        mask: Any,
        causal: bool,
        scale: float | None,
        window: tuple[int, int] | None,
        softcap: float,
        query_start: Integers,
        key_lengths: Integers | None,
        enable_gqa: bool,
        device: str | None,
        threads: int | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self._like, self._progress, self._threads = given["q"], progress, thread_count(threads)
        tensors = {name: _tensor(name, value) for name, value in given.items()}
        self.dtype = _common_dtype(tensors)
        self.sizes = sizes = _sizes(tensors, enable_gqa)
        self._device = _device(device, tensors)
        operands = [
            tensor._create_view((sizes.b, heads, *map(int, tensor.shape[-2:])), self.dtype)
            for tensor, heads in zip(tensors.values(), (sizes.heads, *[sizes.key_heads] * 2), strict=False)
        ]
        bounds = np.empty((sizes.b, 2), np.int32)
        bounds[:, 0] = _integers("query_start", query_start, sizes.b, -_FAR, _FAR)
        bounds[:, 1] = _integers("key_lengths", sizes.s if key_lengths is None else key_lengths, sizes.b, 0, sizes.s)
        operands.append(tvm_ffi.from_dlpack(bounds))
        if mask is not None:
            operands.append(_mask(mask, sizes))
        self._operands = [self._placed(operand) for operand in operands]
        left, right = _window(window)
        self._kernel = AttentionOperator(
            heads=sizes.heads,
            key_heads=sizes.key_heads,
            head_dim=sizes.head_dim,
            value_dim=sizes.value_dim,
            dtype=self.dtype,
            scale=sizes.head_dim**-0.5 if scale is None else _number("scale", scale, -math.inf),
            softcap=_number("softcap", softcap, 0.0),
            mask=None if mask is None else str(operands[-1].dtype),
            causal=bool(causal),
            left=left,
            right=right,
        )

    def run(self, stage: str | None) -> Any:
        """Computes the scores of a stage, or the output if that is None."""
        sizes, kernel = self.sizes, self._kernel
        shape, dtype = (sizes.b, sizes.heads, sizes.n, sizes.value_dim), self.dtype
        if stage is not None:
            kernel = AttentionScores(**vars(kernel), stage=stage)
            shape, dtype = (*shape[:3], sizes.s), "float32"
        if math.prod(shape) > _MOST_ELEMENTS:
            raise AttentionError(f"the result {shape} has 2**31 or more elements: call it for fewer sequences or heads")
        final = (*sizes.lead, sizes.n, shape[3])
        if 0 in shape or sizes.s == 0:
            return _zeros(self._like, final, dtype, self._device)
        module = compiled_kernel(kernel, _target(self._device, dtype), self._progress)
        if self._device.dlpack_device_type() == tvm.cpu().dlpack_device_type():
            module.get_function("set_threads", query_imports=True)(self._threads)
        result, output = _empty(self._like, shape, dtype, self._device)
        module["main"](*self._operands, output)
        self._device.sync()
        return _given(self._like, result, output, final)

    def _placed(self, tensor: Any) -> Any:
        """The tensor on the call's device."""
        if tensor.device == self._device:
            return tensor
        copy = tvm.runtime.empty(tensor.shape, str(tensor.dtype), self._device)
        return copy.copyfrom(tensor)


# --- tensors in ---


def _tensor(name: str, value: Any) -> Any:
    """A value as a compact TVM tensor, without a copy where that is possible."""
    try:
        if isinstance(value, np.ndarray):
            return _of_array(value)
        if not hasattr(value, "__dlpack__"):
            raise AttentionError(f"{name} is {shorten(value)}; give an array of NumPy or a tensor with DLPack")
        if not _is_torch(value):
            return tvm_ffi.from_dlpack(value, require_contiguous=True)
        if value.is_cuda:
            sys.modules["torch"].cuda.current_stream(value.device).synchronize()
        return tvm_ffi.from_dlpack(value.detach().contiguous())
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise AttentionError(f"{name} cannot be read: {one_line(error)}") from error


def _of_array(array: np.ndarray) -> Any:
    dtype = str(array.dtype)
    if dtype not in (*DTYPES, "bool"):
        raise AttentionError(f"an array of {dtype} does not fit; use {', '.join(DTYPES)} (or bool for a mask)")
    # NumPy's DLPack neither knows bfloat16 nor gives away arrays that may not be written.
    bits = np.require(array, requirements=["C", "A", "W"]).view(f"uint{8 * array.itemsize}")
    tensor: Any = tvm_ffi.from_dlpack(bits)  # TVM's class, which has more methods
    return tensor._create_view(array.shape, dtype)


def _common_dtype(tensors: dict[str, Any]) -> str:
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1 or dtypes["q"] not in DTYPES:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise AttentionError(f"{listed}: all must have one dtype of {', '.join(DTYPES)}")
    return dtypes["q"]


def _sizes(tensors: dict[str, Any], enable_gqa: bool) -> _Sizes:
    shapes = {name: tuple(map(int, tensor.shape)) for name, tensor in tensors.items()}
    q, k, v = shapes["q"], shapes["k"], shapes.get("v", shapes["k"])
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if min(map(len, shapes.values())) < 2 or len({*map(len, shapes.values())}) > 1:
        raise AttentionError(f"{listed}: all need the same number of dimensions, at least 2")
    if q[-1] != k[-1] or k[-2] != v[-2] or k[:-2] != v[:-2] or 0 in (q[-1], v[-1]):
        raise AttentionError(f"{listed}: give q (..., H, n, D), k (..., G, s, D) and v (..., G, s, F)")
    heads, key_heads = (shape[-3] if len(q) > 3 else 1 for shape in (q, k))
    same = q[:-3] == k[:-3] and (len(q) > 3 or q[:-2] == k[:-2])
    if not same or 0 in (heads, key_heads) or heads % key_heads:
        raise AttentionError(f"{listed}: dimensions before the heads must agree, and key heads divide the heads")
    if heads != key_heads and not enable_gqa:
        raise AttentionError(f"{heads} heads and {key_heads} key heads need enable_gqa=True")
    large = [name for name, shape in shapes.items() if math.prod(shape) > _MOST_ELEMENTS]
    if large or max(q[-2], k[-2]) >= _FAR:
        raise AttentionError(f"{listed}: 2**31 or more elements; call it for fewer sequences or heads")
    lead = q[:-2]
    return _Sizes(lead, math.prod(lead) // heads, heads, key_heads, q[-2], k[-2], q[-1], v[-1])


def _mask(value: Any, sizes: _Sizes) -> Any:
    """The mask as a tensor (1 or b, 1 or H, 1 or n, s)."""
    full = (*sizes.lead, sizes.n, sizes.s)
    tensor = _tensor("mask", value)
    given = tuple(map(int, tensor.shape))
    shape = (1,) * (len(full) - len(given)) + given
    if len(given) > len(full) or any(extent not in (1, most) for extent, most in zip(shape, full, strict=True)):
        raise AttentionError(f"mask {given} does not broadcast to {full}")
    dtype = str(tensor.dtype)
    if dtype not in ("bool", *DTYPES):
        raise AttentionError(f"the mask is {dtype}; use bool or one of {', '.join(DTYPES)}")
    if dtype == "bool":
        dtype = BOOLEAN
    outer = shape[:-3] if len(full) > 3 else shape[:-2]
    heads = shape[-3] if len(full) > 3 else 1
    whole = full[: len(outer)]
    if shape[-1] != sizes.s or (outer != whole and math.prod(outer) != 1):
        # The kernel broadcasts over sequences as a whole, heads and queries.
        outer = whole if math.prod(outer) != 1 else outer
        array = tensor.numpy() if dtype != "bfloat16" else tensor._create_view(given, "uint16").numpy()
        array = np.broadcast_to(array.reshape(shape), (*outer, *shape[len(outer) : -1], sizes.s))
        copy = tvm.runtime.tensor(np.ascontiguousarray(array).view(f"uint{8 * array.itemsize}"), tensor.device)
        tensor = copy
    folded = (math.prod(outer), heads, shape[-2], sizes.s)
    if math.prod(folded) > _MOST_ELEMENTS:
        raise AttentionError(f"mask {given}: 2**31 or more elements; call it for fewer sequences or heads")
    return tensor._create_view(folded, dtype)


def _integers(name: str, value: Integers, count: int, least: int, most: int) -> np.ndarray:
    """A value for each sequence."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.shape not in ((), (count,)):
        raise AttentionError(f"{name} is {shorten(value)}; give an integer, or {count}, one for each sequence")
    if array.size and (array.min() < least or array.max() > most):
        raise AttentionError(f"{name} is {shorten(value)}; give integers from {least} to {most}")
    return array


def _window(window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    pair = tuple(window) if isinstance(window, tuple | list) else ()
    if len(pair) != 2 or not all(type(extent) is int and extent >= -1 for extent in pair):
        raise AttentionError(f"window is {shorten(window)}; give two integers, keys before and after, -1 for all")
    left, right = (-1 if extent >= _FAR else extent for extent in pair)
    return left, right


def _number(name: str, value: float, least: float) -> float:
    number = float(value) if isinstance(value, int | float | np.number) else math.nan
    if not (math.isfinite(number) and abs(number) < 1e30 and number >= least):
        raise AttentionError(f"{name} is {shorten(value)}; give a finite number{' from 0 on' if least == 0 else ''}")
    return number


# --- devices ---


def _device(name: str | None, tensors: dict[str, Any]) -> Any:
    """The device of the tensors; for tensors in the host's memory, the one that `name` asks for."""
    places = {str(tensor.device): tensor.device for tensor in tensors.values()}
    if len(places) > 1:
        raise AttentionError(f"the tensors are on {', '.join(sorted(places))}; bring them to one device")
    (place,) = places.values()
    wanted = None if name is None else parse_device(name)
    if wanted is None:
        return place
    device = tvm.runtime.device(*wanted)
    if place != device and str(place) != "cpu:0":
        raise AttentionError(f"the tensors are on {place}, not on {name}")
    if reason := device_class(wanted[0]).obstacle(wanted[1]):
        raise DeviceError(f"device {name}: {reason}; tvm-attn devices lists what this machine has")
    return device


_targets: dict[tuple[str, str], targets.Target] = {}


def _target(device: Any, dtype: str) -> targets.Target:
    """The target for a device.

    Raises:
        DeviceError: the device lacks something that code for this dtype needs.
    """
    key = str(device), dtype
    if key not in _targets:
        found = class_of(device)
        if found.kind == "cpu":
            _targets[key] = targets.detect_cpu()
        else:
            target = targets.resolve(found.kind)
            name = f"{found.kind}:{device.index}"
            here = next((entry for entry in found.find() if entry.device == name), None)
            lacking = ["a driver that lists it"] if here is None else list(found.lacks(target, here, dtype, "none"))
            if lacking:
                raise DeviceError(f"{name} lacks {', '.join(lacking)}, which attention in {dtype} needs")
            _targets[key] = target
    return _targets[key]


# --- tensors out ---


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _zeros(like: Any, shape: tuple[int, ...], dtype: str, device: Any) -> Any:
    result, output = _empty(like, shape, dtype, device)
    if 0 not in shape:
        bits = np.zeros(shape, f"uint{8 * output.dtype.itemsize}")
        output._create_view(shape, str(bits.dtype)).copyfrom(bits)
    return _given(like, result, output, shape)


def _empty(like: Any, shape: tuple[int, ...], dtype: str, device: Any) -> tuple[Any, Any]:
    """Memory for a result of the kind of `like`, and the same as a tensor for the kernel; on another device, None and
    the tensor."""
    on_host = str(device) == "cpu:0"
    if isinstance(like, np.ndarray) and on_host:
        from tvm_attn.storage import numpy_dtype

        array = np.empty(shape, numpy_dtype(dtype))
        return array, _of_array(array)
    if _is_torch(like) and (like.is_cuda or on_host):
        torch = sys.modules["torch"]
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
        return tensor, tvm_ffi.from_dlpack(tensor)
    return None, tvm.runtime.empty(shape, dtype, device)


def _given(like: Any, result: Any, output: Any, shape: tuple[int, ...]) -> Any:
    """The result in its final shape, as the kind and on the device of `like`."""
    if result is not None:
        return result.reshape(shape)
    if isinstance(like, np.ndarray):
        return output.numpy().reshape(shape)
    if _is_torch(like):
        torch, dtype = sys.modules["torch"], str(output.dtype)
        bits = output._create_view(output.shape, f"int{8 * output.dtype.itemsize}").numpy()
        return torch.from_numpy(bits).view(getattr(torch, dtype)).reshape(shape)
    if str(output.device) != str(tvm_ffi.from_dlpack(like).device):
        output = tvm.runtime.empty(output.shape, str(output.dtype)).copyfrom(output)
    return output._create_view(shape, str(output.dtype))
