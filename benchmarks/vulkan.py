"""All measurements of a Vulkan device, in one command: `python -m benchmarks.vulkan`.

Checks the compiled models against PyTorch, then measures decoding, memory, matrix products, and the cost of a dispatch;
if PyTorch has CUDA, the same there. `--quick` uses smaller sizes, for software renderers. The result is a JSON file; if
a part fails, its error is recorded, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from safetensors.numpy import save_file
from tvm import te
from tvm.s_tir import Schedule

from tvm_attn import targets, vulkan
from tvm_attn.benchmark.counts import decode_work
from tvm_attn.benchmark.machine import describe_machine, describe_versions
from tvm_attn.benchmark.ours import CompiledSystem
from tvm_attn.benchmark.system import Case
from tvm_attn.cli import Parser, integer, output_file, run
from tvm_attn.compiler.build import build
from tvm_attn.compiler.devices import backend_for
from tvm_attn.compiler.verification import verify_artifact
from tvm_attn.config import PRESETS, GPT2Config
from tvm_attn.errors import DeviceError
from tvm_attn.kernels import Linear
from tvm_attn.model.checkpoint import random_params
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.machine import usable_cores
from tvm_attn.schedule import schedule
from tvm_attn.targets import GpuTarget

ROOT = Path(__file__).parents[1]
_generic = targets.resolve("vulkan")
assert isinstance(_generic, GpuTarget)
_GENERIC: GpuTarget = _generic
_MAGIC = b"TVMATTNV"  # start of the kernels in a library; see tvm_attn/vulkan/codegen/build.py
_STAGES = 16  # dispatches per call of `_stages`
_SMALL = GPT2Config(
    vocab_size=1000, n_positions=128, n_embd=256, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured.

    Attributes:
        rows, features: sizes of matrix products: rows x features times features x features.
        copy_bytes: bytes of the copy that measures memory.
        contexts: tokens in the KV cache of decode calls.
        batches: sequences of decode calls.
        seconds: about how long to time one case.
    """

    rows: int
    features: int
    copy_bytes: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    seconds: float


FULL = Sizes(2048, 4096, 1 << 29, (128, 1000), (1, 8), 3.0)
QUICK = Sizes(256, 768, 1 << 26, (128,), (1,), 1.0)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write; returns the exit status, 1 if a part failed."""
    return run(lambda: _main(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m benchmarks.vulkan", description="Measure a Vulkan device: models, kernels, dispatches."
    )
    parser.add_argument("--device", type=integer(0), default=0, metavar="N", help="vulkan:N; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, for software renderers")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="default: benchmarks/results/vulkan-DEVICE.json"
    )
    return parser


def _main(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    info = next((device for device in vulkan.devices() if device["index"] == args.device), None)
    if info is None:
        raise DeviceError(f"there is no device vulkan:{args.device}; tvm-attn devices lists what this machine has")
    software = device_class("vulkan").is_software(args.device)
    measurement = Measurement(args.device, info, QUICK if args.quick else FULL)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": info,
        "note": "a software renderer: the device is the processor below, its figures say nothing of a GPU"
        if software
        else None,
        "machine": describe_machine(usable_cores()),
        "versions": describe_versions(),
        "quick": args.quick,
    }
    parts: dict[str, Callable[[], Any]] = {
        "models": lambda: measurement.models(full=not args.quick),
        "memory_gbytes": measurement.memory,
        "matmul": measurement.matmul,
        "dispatch": measurement.dispatch,
        "cuda": lambda: _cuda(measurement.sizes),
    }
    failed = False
    for name, part in parts.items():
        print(f"{time.perf_counter() - begin:6.1f} s  {name}", file=sys.stderr)
        try:
            result[name] = part()
        except Exception as error:  # the other parts still run
            failed = True
            result[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    result["statistics"] = vulkan.statistics(args.device)
    result["seconds"] = round(time.perf_counter() - begin, 1)
    text = json.dumps(result, indent=1)
    print(text)
    name = "lavapipe" if "llvmpipe" in info["name"] else "-".join(info["name"].lower().split())
    file = args.json or ROOT / "benchmarks" / "results" / f"vulkan-{name}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)
    return int(failed)


class Measurement:
    """Measures one device.

    Args:
        index: the index in "vulkan:index".
        info: its entry in `vulkan.devices()`.
        sizes: what to measure.
    """

    def __init__(self, index: int, info: dict[str, Any], sizes: Sizes) -> None:
        self.device, self.index, self.info, self.sizes = tvm.vulkan(index), index, info, sizes

    def models(self, full: bool) -> list[dict[str, Any]]:
        """Builds and checks models in both dtypes, and measures 124M: seconds, errors, tokens/s, SPIR-V bytes."""
        results = []
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            small = _checkpoint(root / "small", _SMALL)
            for name, model in (("demo", "demo"), ("2 layers of 256", small), ("gpt2", "gpt2")):
                for dtype in ("float32", "float16"):
                    artifact = root / f"{name}-{dtype}"
                    start = time.perf_counter()
                    built = build(model, "vulkan", dtype, out=artifact, verify=False)
                    entry: dict[str, Any] = {"model": name, "weights": built.source, "dtype": dtype}
                    entry["build_seconds"] = round(time.perf_counter() - start, 1)
                    entry["spirv_bytes"] = _spirv_bytes(next(artifact.glob("lib-vulkan-*.so")))
                    if name != "gpt2" or full:
                        entry["against_pytorch"] = self._check(artifact)
                    if name == "gpt2":
                        entry["decode"] = self._decode(artifact)
                    results.append(entry)
        return results

    def _check(self, artifact: Path) -> dict[str, Any]:
        """The worst of all comparisons with PyTorch in float32 on the stored weights."""
        report = verify_artifact(artifact, f"vulkan:{self.index}")
        return {
            "comparisons": len(report.checks),
            "passed": all(check.passed for check in report.checks),
            "nmse": max(check.nmse for check in report.checks),
            "bound": report.bounds.nmse,
            "relative_max_abs": max(check.relative_max_abs for check in report.checks),
            "top1": min(check.top1 for check in report.checks),
        }

    def _decode(self, artifact: Path) -> list[dict[str, Any]]:
        """Median time of a decode step with the greedy choice of the token, by the host's clock."""
        system = CompiledSystem(artifact, usable_cores(), max(self.sizes.batches), f"vulkan:{self.index}")
        results = []
        for context in self.sizes.contexts:
            for batch in self.sizes.batches:
                case = Case("decode", context, batch)
                system.fill(case)
                before = vulkan.statistics(self.index)
                times = system.time(case, self.sizes.seconds)
                after = vulkan.statistics(self.index)
                seconds, steps = statistics.median(times), len(times) + 1
                moved = decode_work(system.config, context, batch, system.storage).bytes
                results.append(
                    {
                        "context": context,
                        "batch": batch,
                        "tokens_per_second": batch / seconds,
                        "gbytes_per_second": moved / seconds / 1e9,
                        "operations_per_step": (after["operations"] - before["operations"]) / steps,
                        "submissions_per_step": (after["submissions"] - before["submissions"]) / steps,
                        "barriers_per_step": (after["barriers"] - before["barriers"]) / steps,
                    }
                )
        return results

    def memory(self) -> float:
        """GB/s read and written by a copy kernel."""
        count = self.sizes.copy_bytes // 4
        source = te.placeholder((count,), "float32", "source")
        module = Schedule(te.create_prim_func([source, te.compute((count,), lambda i: source[i], "copy")]))
        _bind(module, "copy", 4)
        function = _compiled(module.mod["main"], _GENERIC)
        tensors = [tvm.runtime.empty((count,), "float32", self.device) for _ in range(2)]
        return 2 * self.sizes.copy_bytes / self._seconds(function, *tensors) / 1e9

    def matmul(self) -> list[dict[str, Any]]:
        """The model's linear layer with many rows: TFLOP/s by schedule and dtype of the weight."""
        rows, features, results = self.sizes.rows, self.sizes.features, []
        for name, target in self._targets().items():
            for dtype in ("float32", "float16"):
                kernel = Linear(features, features, target.tile_rows, target.tile_columns, dtype)
                rng = np.random.default_rng(0)
                x = rng.standard_normal((rows // kernel.rows, kernel.rows, features), np.float32)
                weight = rng.standard_normal((kernel.strips, features, kernel.columns), np.float32).astype(dtype)
                bias = rng.standard_normal(features, np.float32)
                tensors = [tvm.runtime.tensor(array, self.device) for array in (x, weight, bias, np.zeros_like(x))]
                function = _compiled(schedule(kernel, target), target)
                seconds = self._seconds(function, *tensors)
                plain = weight.transpose(1, 0, 2).reshape(features, -1)[:, :features].astype(np.float32)
                expected = x.reshape(rows, features) @ plain + bias
                difference = tensors[-1].numpy().reshape(rows, features) - expected
                results.append(
                    {
                        "schedule": name,
                        "weights": dtype,
                        "tflops": 2 * rows * features * features / seconds / 1e12,
                        "nmse": float((difference**2).sum() / (expected**2).sum()),
                    }
                )
        return results

    def _targets(self) -> dict[str, GpuTarget]:
        """Targets with different schedules: the limits of all devices, and those of this device."""
        limits = self.info["limits"]
        threads, shared = min(256, limits["max_workgroup_invocations"]), min(49152, limits["max_shared_memory_bytes"])
        attributes = {
            "max_num_threads": threads,
            "max_threads_per_block": threads,
            "max_shared_memory_per_block": shared,
        }
        own = replace(_GENERIC, tvm=_GENERIC.tvm | attributes, max_threads=threads, shared_bytes=shared)
        return {"vulkan-generic": _GENERIC, "limits of the device": own}

    def dispatch(self) -> dict[str, Any]:
        """The cost of a dispatch of one workgroup, on the host and, by the device's timestamps, on the device."""
        results: dict[str, Any] = {"stages": _STAGES}
        for name, chained in (("dependent", True), ("independent", False)):
            function = _compiled(_stages(chained), _GENERIC)
            tensors = [tvm.runtime.empty((64,), "float32", self.device) for _ in range(_STAGES + 1)]
            results[f"device_us_{name}"] = self._seconds(function, *tensors) / _STAGES * 1e6
            call, times = function["main"], []
            for _ in range(50):
                self.device.sync()
                start = time.perf_counter()
                for _ in range(8):
                    call(*tensors)
                times.append((time.perf_counter() - start) / (8 * _STAGES) * 1e6)
            results[f"host_us_{name}"] = {"median": statistics.median(times), "least": min(times)}
        return results

    def _seconds(self, function: Any, *tensors: Any) -> float:
        """Median device time of a call, from the device's timestamps."""
        once = function.time_evaluator("main", self.device, number=1, repeat=2)(*tensors).min
        number = max(1, min(200, int(self.sizes.seconds / 5 / max(once, 1e-6))))
        return float(function.time_evaluator("main", self.device, number=number, repeat=5)(*tensors).median)


def _compiled(function: tvm.tirx.PrimFunc, target: GpuTarget) -> Any:
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.tirx.build(module, target=backend_for(target).tvm_target(target))


def _bind(module: Schedule, name: str, lanes: int = 1) -> None:
    """64 threads per workgroup, `lanes` neighbouring elements each."""
    (loop,) = module.get_loops(module.get_sblock(name))
    block, thread, lane = module.split(loop, [None, 64, lanes])
    module.bind(block, "blockIdx.x")
    module.bind(thread, "threadIdx.x")
    module.vectorize(lane)


def _stages(chained: bool) -> tvm.tirx.PrimFunc:
    """_STAGES kernels of one workgroup: each adds one to the result of the one before, or to the same input."""
    values = [te.placeholder((64,), "float32", "x")]
    for stage in range(_STAGES):
        values.append(_plus_one(values[-1 if chained else 0], f"stage{stage}"))
    module = Schedule(te.create_prim_func(values))
    for stage in range(_STAGES):
        _bind(module, f"stage{stage}")
    return module.mod["main"]


def _plus_one(source: Any, name: str) -> Any:
    return te.compute(source.shape, lambda i: source[i] + 1.0, name)


def _checkpoint(folder: Path, config: GPT2Config) -> Path:
    folder.mkdir()
    save_file(dict(random_params(config)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    return folder


def _spirv_bytes(library: Path) -> dict[str, int]:
    """Bytes of SPIR-V of each kernel in a library, largest first."""
    content = library.read_bytes()
    start = content.index(_MAGIC)
    length = int.from_bytes(content[start + 12 : start + 16], "little")
    kernels = json.loads(content[start + 16 : start + 16 + length])["kernels"]
    sizes = {kernel["name"]: kernel["size"] for kernel in kernels}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _cuda(sizes: Sizes) -> dict[str, Any] | None:
    """PyTorch on CUDA: the same products, and transformers' GPT-2 124M, eager with its cache. None without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "matmul": [],
        "decode": [],
    }
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(sizes.rows, sizes.features, dtype=dtype, device="cuda")
        weight = torch.randn(sizes.features, sizes.features, dtype=dtype, device="cuda")
        seconds = _cuda_seconds(partial(torch.matmul, x, weight), 50)
        flops = 2 * sizes.rows * sizes.features**2
        result["matmul"].append({"dtype": str(dtype), "tflops": flops / seconds / 1e12})
    for dtype in (torch.float32, torch.float16):
        result["decode"] += [
            _cuda_decode(dtype, context, batch) for context in sizes.contexts for batch in sizes.batches
        ]
    return result


def _cuda_decode(dtype: Any, context: int, batch: int) -> dict[str, Any]:
    import torch
    from transformers import GPT2Config as Config
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(Config(**PRESETS["gpt2"].to_dict()))
    model = model.to("cuda", dtype).eval()
    ids = torch.randint(0, 50257, (batch, context), device="cuda")
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values

        def step() -> Any:
            logits = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
            cache.crop(context)
            return logits.argmax(-1).cpu()

        seconds = _cuda_seconds(step, 50)
    return {"dtype": str(dtype), "context": context, "batch": batch, "tokens_per_second": batch / seconds}


def _cuda_seconds(call: Callable[[], Any], count: int) -> float:
    import torch

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    sys.exit(main())
