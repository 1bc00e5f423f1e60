"""ONNX files of one small GPT-2, as the exporters that people use write them.

`CASES` maps a name to a function that writes the files into a folder and returns the one to import. The checkpoint is
the same in all of them.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import nn
from transformers import DynamicCache, GPT2LMHeadModel
from transformers import GPT2Config as HuggingFaceConfig

SIZES: dict[str, Any] = {"vocab_size": 96, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
Case = Callable[[Path], Path]


def model(implementation: str = "eager", **changes: Any) -> GPT2LMHeadModel:
    """The model; every weight differs from every other."""
    config = HuggingFaceConfig(**(SIZES | {"attn_implementation": implementation} | changes))
    generator = torch.Generator().manual_seed(0)
    module = GPT2LMHeadModel(config).eval()
    for name, weight in sorted(module.state_dict().items()):
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(noise * (0.2 if weight.ndim > 1 else 0.1) + (1 if "ln_" in name and "weight" in name else 0))
    module.tie_weights()
    return module


class Flat(nn.Module):
    """A model whose past keys and values are separate arguments and results."""

    def __init__(self, module: GPT2LMHeadModel, stacked: bool = False) -> None:
        super().__init__()
        self.module, self.stacked = module, stacked

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, *past: Any) -> Any:
        pairs = [(p[0], p[1]) for p in past] if self.stacked else list(zip(past[::2], past[1::2], strict=True))
        cache = DynamicCache(pairs) if pairs else DynamicCache(config=self.module.config)
        out = self.module(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        layers = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        present = [torch.stack(pair) for pair in layers] if self.stacked else [part for pair in layers for part in pair]
        return (out.logits, *present)


class Logits(nn.Module):
    """`masked`: with a mask of ones, since the older exporter lacks what transformers finds out without one."""

    def __init__(self, module: GPT2LMHeadModel, masked: bool = False) -> None:
        super().__init__()
        self.module, self.masked = module, masked

    def forward(self, input_ids: Any) -> Any:
        mask = torch.ones_like(input_ids) if self.masked else None
        return self.module(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def past(batch: int = 2, length: int = 3, stacked: bool = False) -> list[torch.Tensor]:
    """Past keys and values of every layer."""
    shape = (batch, SIZES["n_head"], length, SIZES["n_embd"] // SIZES["n_head"])
    shape = (2, *shape) if stacked else shape
    return [torch.randn(shape) for _ in range(SIZES["n_layer"] * (1 if stacked else 2))]


def export(module: nn.Module, arguments: tuple[Any, ...], path: Path, dynamo: bool, **options: Any) -> Path:
    with quiet(), torch.no_grad():
        torch.onnx.export(module, arguments, str(path), dynamo=dynamo, verbose=False, **options)
    return path


def dynamo(folder: Path, *, opset: int, dynamic: bool, with_past: bool, implementation: str = "sdpa") -> Path:
    ids = torch.randint(0, SIZES["vocab_size"], (2, 5))
    path, options = folder / "model.onnx", {"opset_version": opset}
    batch, new, old = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    if not with_past:
        shapes = {"dynamic_shapes": ({0: batch, 1: new},)} if dynamic else {}
        return export(Logits(model(implementation)), (ids,), path, True, **options, **shapes)
    entries = past()
    arguments = (ids, torch.ones(2, 8, dtype=torch.int64), torch.arange(3, 8).expand(2, 5).contiguous(), *entries)
    if dynamic:
        options["dynamic_shapes"] = (
            {0: batch, 1: new}, {0: batch, 1: torch.export.Dim.DYNAMIC}, {0: batch, 1: new},
            tuple({0: batch, 2: old} for _ in entries),
        )  # fmt: skip
    return export(Flat(model(implementation)), arguments, path, True, **options)


def legacy(
    folder: Path, *, opset: int = 17, with_past: bool = False, stacked: bool = False, dynamic: bool = True,
    positions: bool = True, implementation: str = "eager", half: bool = False,
    empty: bool = False, **changes: Any,
) -> Path:  # fmt: skip
    """TorchScript's exporter; with past keys and values in Optimum's layout, or `stacked` in ONNX Runtime's.

    `empty` leaves out the past and keeps what is called present.
    """
    module, path = model(implementation, **changes), folder / "model.onnx"
    module = module.half() if half else module
    ids = torch.randint(0, SIZES["vocab_size"], (2, 5))
    names, axes = ["input_ids"], {"input_ids": {0: "batch_size", 1: "sequence_length"}}
    axes["logits"] = dict(axes["input_ids"])
    options: dict[str, Any] = {"opset_version": opset, "do_constant_folding": True}
    if not with_past:
        options |= {"input_names": names, "output_names": ["logits"]} | ({"dynamic_axes": axes} if dynamic else {})
        return export(Logits(module, masked=True), (ids,), path, False, **options)
    entries, tokens = past(stacked=stacked), torch.ones(2, 5 if empty else 8, dtype=torch.int64)
    entries = [entry.half() for entry in entries] if half else entries
    arguments: tuple[Any, ...] = (ids, tokens, torch.arange(3, 8).expand(2, 5).contiguous() if positions else None)
    names += ["attention_mask", *(["position_ids"] if positions else [])]
    axes |= {"attention_mask": {0: "batch_size", 1: "total"}, "position_ids": {0: "batch_size", 1: "sequence_length"}}
    outputs = ["logits"]
    for index in range(SIZES["n_layer"]):
        for part in [""] if stacked else [".key", ".value"]:
            ins = f"past_{index}" if stacked else f"past_key_values.{index}{part}"
            outs = f"present_{index}" if stacked else f"present.{index}{part}"
            names += [] if empty else [ins]
            outputs.append(outs)
            first = 1 if stacked else 0
            axes[ins] = {first: "batch_size", first + 2: "past_sequence_length"}
            axes[outs] = {first: "batch_size", first + 2: "total"}
    if dynamic:
        options["dynamic_axes"] = {name: entry for name, entry in axes.items() if name in names + outputs}
    options |= {"input_names": names, "output_names": outputs}
    return export(Flat(module, stacked), (*arguments, *([] if empty else entries)), path, False, **options)


class OldBlock(nn.Module):
    """Attention as transformers computed it until 2021: a mask of numbers times the scores, less 10,000."""

    def __init__(self, block: Any, config: HuggingFaceConfig) -> None:
        super().__init__()
        self.block, self.n_head = block, config.n_head
        size = config.n_positions
        self.register_buffer("mask", torch.tril(torch.ones(size, size)).view(1, 1, size, size))

    def forward(self, x: Any, layer_past: Any) -> Any:
        attention = self.block.attn
        parts = attention.c_attn(self.block.ln_1(x)).split(x.size(-1), dim=2)
        q, k, v = (part.view(*part.size()[:-1], self.n_head, -1).permute(0, 2, 1, 3) for part in parts)
        k = k.permute(0, 1, 3, 2)
        if layer_past is not None:
            k = torch.cat((layer_past[0].transpose(-2, -1), k), dim=-1)
            v = torch.cat((layer_past[1], v), dim=-2)
        present = torch.stack((k.transpose(-2, -1), v))
        weights = torch.matmul(q, k) / math.sqrt(v.size(-1))
        rows, columns = weights.size(-2), weights.size(-1)
        mask = self.mask[:, :, columns - rows : columns, :columns]
        weights = nn.Softmax(dim=-1)(weights * mask - 1e4 * (1 - mask))
        joined = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        x = x + attention.c_proj(joined.view(*joined.size()[:-2], -1))
        inner = self.block.mlp.c_fc(self.block.ln_2(x))
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * torch.pow(inner, 3))))
        return x + self.block.mlp.c_proj(inner), present


class Old(nn.Module):
    """The module that the model zoo's files were exported from, with or without its head."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        module = model()
        self.body, self.head = module.transformer, module.lm_head if head else None
        self.blocks = nn.ModuleList(OldBlock(block, module.config) for block in self.body.h)

    def forward(self, ids: Any, *layer_past: Any) -> Any:
        shape = ids.size()
        ids = ids.view(-1, shape[-1])
        start = layer_past[0][0].size(-2) if layer_past else 0
        positions = torch.arange(start, shape[-1] + start, dtype=torch.long).unsqueeze(0).view(-1, shape[-1])
        x, presents = self.body.wte(ids) + self.body.wpe(positions), []
        for index, block in enumerate(self.blocks):
            x, present = block(x, layer_past[index] if layer_past else None)
            presents.append(present)
        x = self.body.ln_f(x).view(*shape, -1)
        return (x if self.head is None else self.head(x), *presents)


def zoo(folder: Path, *, opset: int, head: bool, with_past: bool = False, dynamic: bool = True) -> Path:
    ids = torch.randint(0, SIZES["vocab_size"], (2, 5) if with_past else (1, 2, 5))
    entries = past(stacked=True) if with_past else []
    names = ["input1", *(f"past{index}" for index in range(len(entries)))]
    options: dict[str, Any] = {"opset_version": opset, "input_names": names, "output_names": ["output1"]}
    if dynamic:
        axes = {"input1": {axis: f"input1_{axis}" for axis in range(ids.ndim)}}
        axes |= {name: {1: "batch", 3: "past"} for name in names[1:]}
        options["dynamic_axes"] = axes
    return export(Old(head), (ids, *entries), folder / "model.onnx", False, **options)


def optimized(folder: Path, source: Case, *, half: bool = False, **changes: Any) -> Path:
    """ONNX Runtime's optimizer for transformers."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model import OnnxModel
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("gpt2")
    for name, value in changes.items():
        setattr(options, name, value)
    path = source(folder)
    with quiet():
        found = optimize_model(
            str(path), "gpt2", num_heads=SIZES["n_head"], hidden_size=SIZES["n_embd"], optimization_options=options,
            opt_level=0,
        )  # fmt: skip
        path = folder / "optimized.onnx"
        found.save_model_to_file(str(path))
        if half:
            found = OnnxModel(onnx.load(path))
            found.convert_float_to_float16(use_symbolic_shape_infer=True, keep_io_types=False)
            found.save_model_to_file(str(path))
    return path


def basic(folder: Path, source: Case, level: str = "ORT_ENABLE_EXTENDED") -> Path:
    """The graph that ONNX Runtime itself runs, saved."""
    import onnxruntime

    path = folder / "saved.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(source(folder)), options, providers=["CPUExecutionProvider"])
    return path


def quantized(folder: Path, source: Case, **options: Any) -> Path:
    """ONNX Runtime's dynamic quantization."""
    from onnxruntime.quantization import quantize_dynamic

    path = folder / "quantized.onnx"
    with quiet():
        extra = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of results of operators that onnx does not know
        quantize_dynamic(str(source(folder)), str(path), extra_options=extra, **options)
    return path


def nbits(folder: Path, source: Case, **options: Any) -> Path:
    """Matrices of 4 or 8 bits: MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    with quiet():
        config = DefaultWeightOnlyQuantConfig(
            **({"block_size": 32, "is_symmetric": True, "accuracy_level": 0} | options)
        )
        quantizer = MatMulNBitsQuantizer(onnx.load(source(folder)), algo_config=config)
        quantizer.process()
        path = folder / "nbits.onnx"
        quantizer.model.save_model_to_file(str(path))
    return path


def merged(folder: Path) -> Path:
    """Optimum's merged decoder: `If` on `use_cache_branch` between a graph with and a graph without past."""
    parts = []
    for name, with_past in (("with", True), ("without", False)):
        (folder / name).mkdir()
        parts.append(onnx.load(legacy(folder / name, with_past=True, empty=not with_past)))
    first = parts[0]
    weights = {tensor.name: tensor for part in parts for tensor in part.graph.initializer}
    then, other = (helper.make_graph(p.graph.node, f"branch{i}", [], p.graph.output) for i, p in enumerate(parts))
    flag = helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
    names = [value.name for value in first.graph.output]
    node = helper.make_node("If", ["use_cache_branch"], names, then_branch=then, else_branch=other)
    graph = helper.make_graph([node], "merged", [*first.graph.input, flag], first.graph.output, list(weights.values()))
    path = folder / "decoder_model_merged.onnx"
    onnx.save(helper.make_model(graph, opset_imports=first.opset_import, ir_version=first.ir_version), path)
    return path


def transformers(folder: Path, *, generation: bool = False, dynamic: bool = True, **options: Any) -> Path:
    """transformers.exporters."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    module = model("sdpa")
    inputs = {"input_ids": torch.randint(0, SIZES["vocab_size"], (2, 5)), "attention_mask": torch.ones(2, 5).long()}
    with quiet():
        exporter = OnnxExporter()
        if generation:
            found = exporter.export_for_generation(module, inputs, OnnxConfig(dynamic=dynamic, **options))
        else:
            found = exporter.export(module, inputs, OnnxConfig(dynamic=dynamic, **options))
        found.save_pretrained(str(folder))
    return sorted(folder.rglob("*.onnx"))[-1]


CASES: dict[str, Case] = {}
_partial = functools.partial
for _opset in (18, 20, 23):
    for _dynamic in (False, True):
        for _past in (False, True):
            _name = f"dynamo-{_opset}-{'dynamic' if _dynamic else 'static'}{'-past' if _past else ''}"
            CASES[_name] = _partial(dynamo, opset=_opset, dynamic=_dynamic, with_past=_past)
CASES["dynamo-20-eager"] = _partial(dynamo, opset=20, dynamic=True, with_past=True, implementation="eager")
_fused = _partial(optimized, source=_partial(zoo, opset=12, head=True, with_past=True))
CASES |= {
    "legacy-14": _partial(legacy, opset=14),
    "legacy-17-static": _partial(legacy, dynamic=False),
    "legacy-17-sdpa": _partial(legacy, implementation="sdpa"),
    "legacy-17-past": _partial(legacy, with_past=True),
    "legacy-20-untied": _partial(legacy, opset=20, tie_word_embeddings=False),
    "legacy-17-gelu": _partial(legacy, activation_function="gelu"),
    "optimum": _partial(legacy, with_past=True),
    "optimum-sdpa": _partial(legacy, with_past=True, implementation="sdpa"),
    "optimum-no-positions": _partial(legacy, with_past=True, positions=False),
    "optimum-merged": merged,
    "optimum-half": _partial(legacy, with_past=True, half=True),
    "ort-stacked": _partial(legacy, with_past=True, stacked=True),
    "ort-optimized": _partial(optimized, source=_partial(legacy, opset=14)),
    "ort-optimized-past": _partial(optimized, source=_partial(legacy, opset=14, with_past=True, stacked=True)),
    "ort-optimized-half": _partial(optimized, source=_partial(legacy, opset=14), half=True),
    "ort-optimized-zoo": _partial(optimized, source=_partial(zoo, opset=12, head=True, with_past=True)),
    "ort-optimized-zoo-half": _partial(optimized, source=_partial(zoo, opset=12, head=True, with_past=True), half=True),
    "ort-basic": _partial(basic, source=_partial(legacy, opset=17, with_past=True), level="ORT_ENABLE_BASIC"),
    "ort-extended": _partial(basic, source=_partial(legacy, opset=17, with_past=True)),
    "ort-all": _partial(basic, source=_partial(legacy, opset=17, with_past=True), level="ORT_ENABLE_ALL"),
    "zoo-10": _partial(zoo, opset=10, head=False),
    "zoo-10-head": _partial(zoo, opset=10, head=True),
    "zoo-12-head": _partial(zoo, opset=12, head=True),
    "zoo-12-past": _partial(zoo, opset=12, head=True, with_past=True),
    "zoo-12-static": _partial(zoo, opset=12, head=True, dynamic=False),
    "dynamic-int8": _partial(quantized, source=_partial(legacy, opset=17)),
    "dynamic-int8-channel": _partial(quantized, source=_partial(legacy, opset=17, with_past=True), per_channel=True),
    "dynamic-int8-optimized": _partial(quantized, source=_partial(optimized, source=_partial(legacy, opset=14))),
    "nbits-4": _partial(nbits, source=_fused),
    "nbits-4-asymmetric": _partial(nbits, source=_fused, is_symmetric=False),
    "nbits-8": _partial(nbits, source=_fused, bits=8),
    "nbits-4-qdq": _partial(nbits, source=_partial(legacy, opset=21)),
    "transformers": transformers,
    "transformers-static": _partial(transformers, dynamic=False),
    "transformers-generation": _partial(transformers, generation=True),
    "transformers-fusions": _partial(transformers, ort_fusions="cpu"),
    "transformers-generation-fusions": _partial(transformers, generation=True, ort_fusions="cpu"),
}  # fmt: skip
