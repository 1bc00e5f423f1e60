"""Single kernels against PyTorch on the same numbers: matrix products against cuBLAS, attention against SDPA.

Each kernel is checked before it is timed. Tensors are PyTorch's; the kernels get them through DLPack, without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.devices import in_turns
from benchmarks.gpu.kernel_library import KernelLibrary
from benchmarks.gpu.processes import Entry
from benchmarks.gpu.torch_model import BACKENDS, attention_backend
from tvm_attn.benchmark.device import Clock

ROWS = 1024
"""Rows of GPT-2's products."""
_BOUNDS = {"float16": 2.0**-20, "bfloat16": 2.0**-14, "float32": 1e-6}
"""Bounds on the NMSE against PyTorch in float32: both sides round results to the dtype, PyTorch also its products."""


@dataclass(frozen=True)
class Product:
    """A matrix product to compare.

    Attributes:
        purpose: purpose of the kernel, see `KernelLibrary.timed_function`.
        rows: M.
    """

    purpose: str
    rows: int


def products(quick: bool) -> list[Product]:
    """A large square product in both dtypes, and the layers of 124M at `ROWS` rows."""
    square = [Product(f"matmul 8192 {dtype}", 1024 if quick else 8192) for dtype in ("float16", "bfloat16")]
    return square + [Product(purpose, ROWS) for purpose in ("qkv", "projection", "mlp in", "mlp out", "head")]


def compare_products(library: KernelLibrary, device: str, quick: bool) -> Iterator[Entry]:
    """Each product with its epilogue against cuBLAS on the same numbers, with and without PyTorch's epilogue."""
    clock = Clock(device)
    for product in products(quick):
        yield _product_entry(library, product, device, clock)


def _product_entry(library: KernelLibrary, product: Product, device: str, clock: Clock) -> Entry:
    import torch

    function, kernel = library.timed_function(product.purpose)
    k, n, group, dtype = kernel["in_features"], kernel["out_features"], kernel["rows"], kernel["activations"]
    operands = Operands(device, getattr(torch, dtype), product.rows, k, n, group, kernel)
    ours, theirs = operands.call(function), operands.torch_call()
    ours()
    error = nmse(operands.result(), theirs().float().reshape(product.rows, -1))
    matrices = operands.x.reshape(-1, k), operands.weight.reshape(n, k)
    out = torch.empty(product.rows, n, dtype=matrices[0].dtype, device=device)
    calls = {
        "ours": ours,
        "cublas": lambda: torch.mm(matrices[0], matrices[1].t(), out=out),
        "torch": theirs,
    }
    seconds = in_turns(clock, calls)
    return {
        "what": "product",
        "purpose": product.purpose,
        "family": kernel["family"],
        "dtype": dtype,
        "m": product.rows,
        "k": k,
        "n": n,
        "seconds": seconds,
        "tflops": 2 * product.rows * k * n / seconds["ours"] / 1e12,
        "cublas_tflops": 2 * product.rows * k * n / seconds["cublas"] / 1e12,
        "of_cublas": seconds["cublas"] / seconds["ours"],
        "of_torch": seconds["torch"] / seconds["ours"],
        "nmse": error,
        "passed": error <= _BOUNDS[dtype],
    }


class Operands:
    """PyTorch tensors for a layer of `tvm_attn.kernels.linear`, with unquantized weights.

    Args:
        device, dtype: device and dtype of the tensors.
        rows, k, n: M, K, N.
        group: R, the rows per group; it divides M.
        kernel: the layer's sizes.
    """

    def __init__(self, device: str, dtype: Any, rows: int, k: int, n: int, group: int, kernel: dict[str, Any]) -> None:
        import torch

        self._torch, self._kernel = torch, kernel
        torch.manual_seed(0)
        shape = (rows // group, group)
        self.x = torch.randn(*shape, k, device=device).to(dtype)
        self.weight = (torch.randn(n, k, 1, device=device) / math.sqrt(k)).to(dtype)
        self.bias = torch.randn(n, device=device)
        family = kernel["family"]
        if family == "head":
            self.out = torch.empty(*shape, n, device=device)
            self.arguments = [self.x, self.weight, self.out]
        elif family == "residual_linear":
            self.residual = torch.randn(*shape, n, device=device)
            self.out = torch.empty(*shape, n, device=device)
            self.arguments = [self.x, self.weight, self.bias, self.residual, self.out]
        elif family == "qkv_linear":
            heads, context = kernel["heads"], kernel["context"]
            positions = torch.arange(rows, dtype=torch.int32, device=device)
            slots, places = (positions // context).reshape(shape), (positions % context).reshape(shape)
            cache_shape = (-(-rows // context), 2, heads, context, n // 3 // heads)
            self.cache = torch.zeros(cache_shape, dtype=dtype, device=device)
            self.out = torch.empty(*shape, n // 3, dtype=dtype, device=device)
            self.arguments = [self.x, self.weight, self.bias, slots, places, self.cache, self.out]
        else:
            self.out = torch.empty(*shape, n, dtype=dtype, device=device)
            self.arguments = [self.x, self.weight, self.bias, self.out]

    def call(self, function: Callable[..., Any]) -> Callable[[], Any]:
        """A function that calls our kernel."""
        tensors = [as_tvm(tensor) for tensor in self.arguments]
        return lambda: function(*tensors)

    def torch_call(self) -> Callable[[], Any]:
        """A function that runs the same layer in PyTorch."""
        functional, family = self._torch.nn.functional, self._kernel["family"]
        x, weight = self.x, self.weight.reshape(self.weight.shape[:2])
        bias = self.bias.to(x.dtype)
        if family == "head":
            return lambda: functional.linear(x, weight)
        if family == "residual_linear":
            return lambda: functional.linear(x, weight, bias) + self.residual
        if family == "linear" and self._kernel["activation"] == "gelu_new":
            return lambda: functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
        return lambda: functional.linear(x, weight, bias)

    def result(self) -> Any:
        """Our result as (M, N) float32; queries, keys and values are read from where the kernel wrote them."""
        out = self.out.float().reshape(-1, self.out.shape[-1])
        if self._kernel["family"] != "qkv_linear":
            return out
        written = self.cache.permute(1, 0, 3, 2, 4).reshape(2, -1, out.shape[-1])[:, : len(out)]
        return self._torch.cat([out, written[0].float(), written[1].float()], 1)


def compare_attention(library: KernelLibrary, device: str, batches: tuple[int, ...] = (1, 16)) -> Iterator[Entry]:
    """Causal attention of whole contexts against the backends of scaled_dot_product_attention."""
    clock = Clock(device)
    for batch in batches:
        yield _attention_entry(library, batch, device, clock)


def _attention_entry(library: KernelLibrary, batch: int, device: str, clock: Clock) -> Entry:
    import torch

    function, kernel = library.timed_function("attention")
    heads, head_dim, tokens, group = kernel["heads"], kernel["head_dim"], kernel["context"], kernel["rows"]
    dtype = getattr(torch, kernel["dtype"])
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, heads, head_dim, device=device).to(dtype)
    cache = torch.randn(batch, 2, heads, tokens, head_dim, device=device).to(dtype)
    table = [[slot, slot * tokens, tokens, 0] for slot in range(batch)]
    sequences = torch.tensor(table, dtype=torch.int32, device=device)
    out = torch.empty(batch * tokens // group, group, heads * head_dim, dtype=dtype, device=device)
    tensors = [as_tvm(t) for t in (q.reshape(out.shape), cache, sequences, out)]
    function(*tensors)
    functional = torch.nn.functional
    query, key, value = q.transpose(1, 2).contiguous(), cache[:, 0].contiguous(), cache[:, 1].contiguous()
    exact = functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, scale=kernel["scale"]
    )
    error = nmse(out.float().reshape(batch, tokens, -1), exact.transpose(1, 2).reshape(batch, tokens, -1))
    calls: dict[str, Callable[[], object]] = {"ours": lambda: function(*tensors)}
    missing = {}
    for name in BACKENDS:
        call = _backend_call(name, query, key, value, kernel["scale"])
        try:
            call()
            calls[name] = call
        except RuntimeError as problem:  # the backend is missing, or does not support this device
            missing[name] = " ".join(str(problem).split())[:200]
    seconds = in_turns(clock, calls)
    # Two products of T x T x D, half of which are causal.
    flops = 4 * batch * heads * head_dim * tokens * (tokens + 1) // 2
    return {
        "what": "attention",
        "dtype": kernel["dtype"],
        "batch": batch,
        "heads": heads,
        "tokens": tokens,
        "head_dim": head_dim,
        "seconds": seconds,
        "tflops": {name: flops / value / 1e12 for name, value in seconds.items()},
        "of": {name: value / seconds["ours"] for name, value in seconds.items() if name != "ours"},
        "missing": missing,
        "nmse": error,
        "passed": error <= _BOUNDS[kernel["dtype"]],
    }


def _backend_call(name: str, query: Any, key: Any, value: Any, scale: float) -> Callable[[], object]:
    import torch

    def call() -> object:
        with attention_backend(name):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    return call


def as_tvm(tensor: Any) -> Any:
    """A PyTorch tensor as TVM's, without a copy."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(tensor.contiguous())


def nmse(actual: Any, expected: Any) -> float:
    """Normalised mean squared error of two PyTorch tensors; NaN where one holds NaN."""
    difference = actual.double() - expected.double()
    return float((difference**2).sum() / (expected.double() ** 2).sum())
