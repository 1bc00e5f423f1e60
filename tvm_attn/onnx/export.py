"""Writes GPT-2 as an ONNX file, from an artifact or a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tvm_attn.config import GPT2Config
from tvm_attn.errors import ConfigError, OnnxError, one_line, shorten
from tvm_attn.jsonfile import shorten_path
from tvm_attn.model.checkpoint import cast_params
from tvm_attn.model.params import effective_params
from tvm_attn.model.weights import open_weights
from tvm_attn.onnx import require_onnx
from tvm_attn.onnx.decoder import OPSETS, decoder_graph, weight_types
from tvm_attn.runtime.artifact import MANIFEST, Artifact
from tvm_attn.storage import DTYPES

INLINE_BYTES = 1_500_000_000
"""Most bytes of weights that a file holds itself: protobuf ends at 2 GiB."""
DEFAULT_OPSET = 23
_PAGE = 4096  # where external tensors begin, so that a reader can map them


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        file: the graph, with its weights unless `data` holds them.
        data: the file of the weights beside it; None if there is none.
        opset: the version of its operators.
        dtype: of its matrices, keys, values and logits.
        source: where the weights come from.
        bytes: of the weights.
    """

    file: Path
    data: Path | None
    opset: int
    dtype: str
    source: str
    bytes: int


def export(
    model: str | Path,
    out: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    dtype: str | None = None,
    inline_bytes: int = INLINE_BYTES,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """Writes GPT-2 as ONNX, with past keys and values; `tvm_attn.onnx.decoder` describes its inputs and outputs.

    `onnx.checker` checks the result, with strict shape inference, before it takes its name. More than `inline_bytes` of
    weights go to a second file, `out` with `.data` appended. While that pair replaces an older one there is no file
    `out`: nobody reads a graph with the weights of another.

    Args:
        model: an artifact's folder, or a checkpoint as for `tvm_attn.build`. Quantized matrices are written as the
            float32 values that they stand for.
        out: the file.
        opset: a version in `OPSETS`; the operator `Attention` is used from 23 on.
        dtype: of the graph: "float32", "float16" or "bfloat16". Default: the artifact's; float32 for a quantized one
            and for a checkpoint.
        inline_bytes: most bytes of weights in the file itself.
        progress: called with what happens next.

    Raises:
        OnnxError: onnx is not installed, the opset is not supported, or the file cannot be written.
        ArtifactError, CheckpointError, ConfigError: the model is not usable, or does not fit the dtype.
    """
    onnx = require_onnx()
    show = progress or (lambda message: None)
    if opset not in OPSETS:
        raise OnnxError(f"opset {shorten(opset)} is not supported; choose one from {OPSETS[0]} to {OPSETS[-1]}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {shorten(dtype)} is not supported; choose {', '.join(DTYPES)}")
    config, source, own, params = _open(model, show)
    dtype = dtype or own
    types = weight_types(config, dtype)
    size = sum(prod(shape) * kind.itemsize for shape, kind in types.values())
    target = Path(os.path.abspath(out))
    helper = onnx.helper
    versions = [helper.make_opsetid("", opset)]
    proto = helper.make_model(
        decoder_graph(config, dtype, opset),
        producer_name="tvm_attn",
        opset_imports=versions,
        ir_version=helper.find_min_ir_version_for(versions),
    )
    helper.set_model_props(proto, {"config.json": json.dumps(config.to_dict())})
    data = target.with_name(f"{target.name}.data") if size > inline_bytes else None
    with _beside(target) as folder:
        show("writing the weights")
        arrays = cast_params(params, dtype)
        if data is None:
            for name, array in arrays:
                proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        else:
            with open(folder / data.name, "wb") as file:
                proto.graph.initializer.extend(_external(file, name, array) for name, array in arrays)
        (folder / target.name).write_bytes(proto.SerializeToString())
        del proto
        show("checking the file")
        _check(onnx, folder / target.name)
        if data is not None:
            target.unlink(missing_ok=True)
            os.replace(folder / data.name, data)
        os.replace(folder / target.name, target)
    return Exported(target, data, opset, dtype, source, size)


def _open(
    model: str | Path, show: Callable[[str], None]
) -> tuple[GPT2Config, str, str, Iterator[tuple[str, np.ndarray]]]:
    """Configuration, source, dtype and parameters of an artifact or a checkpoint."""
    if os.path.isfile(Path(model) / MANIFEST):
        artifact = Artifact(model)
        own = "float32" if artifact.quantization != "none" else artifact.dtype
        params = effective_params(artifact.config, artifact.parameters.read, artifact.quantization)
        return artifact.config, str(model), own, params
    weights = open_weights(model, on_download=lambda hub_id: show(f"downloading {hub_id}"))
    return weights.config, weights.source, "float32", weights.params()


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary folder beside a file, gone at the end of the block; failures to write are OnnxErrors."""
    try:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:100]}-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
    except OSError as failure:
        raise OnnxError(
            f"{shorten_path(target)} cannot be written ({failure.strerror}); name another file"
        ) from failure


def _external(file: BinaryIO, name: str, array: np.ndarray) -> Any:
    """Appends a weight to the file of weights, and returns the TensorProto that refers to it."""
    onnx = require_onnx()
    file.seek(-file.tell() % _PAGE, os.SEEK_CUR)
    place = {"location": os.path.basename(file.name), "offset": file.tell(), "length": array.nbytes}
    file.write(np.ascontiguousarray(array).view(np.uint8).data)
    tensor = onnx.TensorProto(
        name=name,
        dims=array.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, entry in place.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def _check(onnx: Any, file: Path) -> None:
    """The full check of `onnx.checker`, which includes strict shape inference, also of the values of shapes.

    Raises:
        OnnxError: the checker refuses the file; a fault of this package or an onnx too old for the opset.
    """
    try:
        onnx.checker.check_model(str(file), full_check=True)
        onnx.shape_inference.infer_shapes(
            onnx.load(file, load_external_data=False), check_type=True, strict_mode=True, data_prop=True
        )
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise OnnxError(f"onnx {onnx.__version__} refuses the exported graph: {one_line(error)}") from error
