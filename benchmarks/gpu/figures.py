"""The figures that the CUDA target is to reach on an H200, together with those of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.gpu.processes import Entry
from tvm_attn.cli import new_table

_SMALL, _LARGE = 124e6, 1.5e9


@dataclass(frozen=True)
class Figure:
    """A figure to reach.

    Attributes:
        work: the work that is measured.
        unit: unit of both values.
        wanted: the value to reach; a lower bound, or an upper bound with `at_most`.
        reached: takes the entries of a run and returns the value, or None if it was not measured.
        at_most: whether lower values are better.
    """

    work: str
    unit: str
    wanted: float
    reached: Callable[[list[Entry]], float | None]
    at_most: bool = False

    def result(self, entries: list[Entry]) -> dict[str, Any]:
        """For JSON: the wanted value, the reached value, and whether it is enough; None if it was not measured."""
        value = self.reached(entries)
        met = None if value is None else (value <= self.wanted if self.at_most else value >= self.wanted)
        return {
            "work": self.work,
            "unit": self.unit,
            "wanted": self.wanted,
            "at_most": self.at_most,
            "reached": value,
            "met": met,
        }


def _chosen(entries: list[Entry], **wanted: Any) -> Iterator[Entry]:
    for entry in entries:
        if all(entry.get(key) == value for key, value in wanted.items()):
            yield entry


def _product(purpose: str) -> Callable[[list[Entry]], float | None]:
    def reached(entries: list[Entry]) -> float | None:
        found = _chosen(entries, what="product", purpose=purpose)
        # A product smaller than the name says, as in a quick run, does not count.
        whole = [entry for entry in found if purpose.split()[0] != "matmul" or entry["m"] == 8192]
        return whole[0]["of_cublas"] if whole else None

    return reached


def _attention(batch: int) -> Callable[[list[Entry]], float | None]:
    def reached(entries: list[Entry]) -> float | None:
        values = [entry["of"].get("flash") for entry in _chosen(entries, what="attention", batch=batch)]
        return values[0] if values else None

    return reached


def _decode(
    parameters: float, batch: int, value: Callable[[Entry], float | None]
) -> Callable[[list[Entry]], float | None]:
    """The best value over the contexts of float16 decode."""

    def reached(entries: list[Entry]) -> float | None:
        kind = {"device": "cuda", "dtype": "float16", "quantization": "none"}
        found = _chosen(entries, what="model", phase="decode", batch=batch, **kind)
        values = [value(entry) for entry in found if 0.8 < entry["parameters"] / parameters < 1.25]
        return max((number for number in values if number is not None), default=None)

    return reached


def _rate(entry: Entry) -> float:
    return float(entry["tokens_per_second"]["tvm_attn"])


def _over_eager(entry: Entry) -> float | None:
    """Speed relative to the faster of PyTorch's eager systems."""
    ratios = [entry["of"][name] for name in ("torch", "transformers") if name in entry["of"]]
    return min(ratios, default=None)


def _load(entries: list[Entry]) -> float | None:
    found = _chosen(entries, what="load", dtype="float16", quantization="none")
    times = [entry["first_token_seconds"] for entry in found if 0.8 < entry["parameters"] / _SMALL < 1.25]
    return min(times, default=None)


FIGURES = (
    Figure("matmul 8192^3, float16", "of cuBLAS", 0.55, _product("matmul 8192 float16")),
    Figure("matmul 8192^3, bfloat16", "of cuBLAS", 0.55, _product("matmul 8192 bfloat16")),
    Figure("QKV layer of 124M, 1024 rows, with epilogue", "of cuBLAS", 0.8, _product("qkv")),
    Figure("projection of 124M, 1024 rows, with epilogue", "of cuBLAS", 0.8, _product("projection")),
    Figure("MLP in of 124M, 1024 rows, with epilogue", "of cuBLAS", 0.8, _product("mlp in")),
    Figure("MLP out of 124M, 1024 rows, with epilogue", "of cuBLAS", 0.8, _product("mlp out")),
    Figure("head of 124M, 1024 rows", "of cuBLAS", 0.8, _product("head")),
    Figure("causal attention, 12 heads x 1024, batch 1", "of SDPA flash", 0.9, _attention(1)),
    Figure("causal attention, 12 heads x 1024, batch 16", "of SDPA flash", 0.9, _attention(16)),
    Figure("decode 124M, float16, batch 1", "tokens/s", 5000, _decode(_SMALL, 1, _rate)),
    Figure("decode 1.5B, float16, batch 1", "of bandwidth", 0.55, _decode(_LARGE, 1, lambda entry: entry["of_limit"])),
    Figure("decode 124M, float16, batch 1", "x eager", 3.0, _decode(_SMALL, 1, _over_eager)),
    Figure("decode 1.5B, float16, batch 1", "x eager", 3.0, _decode(_LARGE, 1, _over_eager)),
    Figure("decode 124M, float16, batch 64", "tokens/s", 80000, _decode(_SMALL, 64, _rate)),
    Figure("load of 124M to the first token", "s", 2.0, _load, at_most=True),
)
"""The figures to reach on an H200."""


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """The tables to print for a run's JSON."""
    table = new_table("Parts", ("part", "error"), ("s", "entries", "failed"))
    for name, part in result["parts"].items():
        failed = sum(entry.get("passed") is False for entry in part["entries"])
        table.add_row(name, part["error"] or "", f"{part['seconds']:.1f}", str(len(part["entries"])), str(failed or ""))
    yield table
    entries = [entry for part in result["parts"].values() for entry in part["entries"]]
    yield from _entry_tables(entries)
    table = new_table("Figures to reach on an H200", ("work", "unit"), ("at least", "reached", ""))
    for figure in result["figures"]:
        wanted = f"{'at most ' if figure['at_most'] else ''}{figure['wanted']:g}"
        verdict = {None: "not measured", True: "yes", False: "no"}[figure["met"]]
        table.add_row(figure["work"], figure["unit"], wanted, _number(figure["reached"]), verdict)
    yield table


def _entry_tables(entries: list[Entry]) -> Iterator[Table]:
    if products := list(_chosen(entries, what="product")):
        table = new_table(
            "Matrix products", ("product", "dtype"), ("M", "K", "N", "TFLOP/s", "cuBLAS", "of cuBLAS", "of PyTorch")
        )
        for entry in products:
            sizes = (str(entry[name]) for name in "mkn")
            rates = (f"{entry[name]:.0f}" for name in ("tflops", "cublas_tflops"))
            ratios = (f"{entry[name]:.2f}" for name in ("of_cublas", "of_torch"))
            table.add_row(entry["purpose"], entry["dtype"], *sizes, *rates, *ratios)
        yield table
    if attention := list(_chosen(entries, what="attention")):
        table = new_table("Causal attention, heads of 64", ("batch", "system"), ("TFLOP/s", "its time / ours"))
        for entry in attention:
            for name, rate in entry["tflops"].items():
                table.add_row(str(entry["batch"]), name, f"{rate:.0f}", _number(entry["of"].get(name)))
        yield table
    if models := list(_chosen(entries, what="model")):
        table = new_table(
            "Models", ("artifact", "device", "case", "system"), ("ms", "tokens/s", "its time / ours", "of limit")
        )
        for entry in models:
            case = f"{entry['phase']} {entry['tokens']} x {entry['batch']}"
            for name, seconds in entry["seconds"].items():
                limit = _number(entry["of_limit"]) if name == "tvm_attn" else ""
                rate = f"{entry['tokens_per_second'][name]:.0f}"
                table.add_row(
                    entry["artifact"],
                    entry["device"],
                    case,
                    name,
                    f"{seconds * 1e3:.3f}",
                    rate,
                    _number(entry["of"].get(name)),
                    limit,
                )
        yield table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
