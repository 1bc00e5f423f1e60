"""Builds an artifact from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

import tvm_attn
from tvm_attn import targets
from tvm_attn.compiler.accuracy import measure_accuracy
from tvm_attn.compiler.artifact import packed_first, write_manifest, write_params
from tvm_attn.compiler.devices import backend_for, layout_for
from tvm_attn.compiler.pipeline import compile_program
from tvm_attn.compiler.replacement import artifact_folder
from tvm_attn.compiler.verification import VERIFY_BATCH, Report, verify
from tvm_attn.config import GPT2Config
from tvm_attn.errors import TargetError
from tvm_attn.inventory import obstacle as device_obstacle
from tvm_attn.kernels.base import shape_of
from tvm_attn.model.gpt2 import MAX_BATCH, build_program
from tvm_attn.model.layout import check_cache, check_types
from tvm_attn.model.module import Program, padded_vocabulary
from tvm_attn.model.params import stored_params
from tvm_attn.model.weights import Weights, open_weights
from tvm_attn.onnx.checkpoint import OnnxCheckpoint
from tvm_attn.onnx.compare import compare_with_file
from tvm_attn.runtime.artifact import DRAFT, FORMAT, Artifact, Library, identity
from tvm_attn.runtime.engine import CompiledEngine
from tvm_attn.schedule import RecordBook
from tvm_attn.schedule.plan import Planned, Sources
from tvm_attn.storage import stored_types
from tvm_attn.targets import CudaTarget, Target


@dataclass(frozen=True)
class Built:
    """What a build made.

    Attributes:
        folder: the artifact.
        source: where the weights came from.
        reports: the verification report of each target; None if the library could not run on this machine, or checking
            was switched off.
        notes: what the user should know, one line each.
        sources: where the decisions of the kernels come from, for each target.
    """

    folder: Path
    source: str
    reports: dict[str, Report | None]
    notes: tuple[str, ...]
    sources: dict[str, Sources]


def build(
    model: str | Path | Weights = "gpt2",
    target: str = "cpu",
    dtype: str = "float32",
    quant: str = "none",
    out: str | Path | None = None,
    draft: str | None = None,
    verify: bool = True,
    random_weights: bool = False,
    progress: Callable[[str], None] = lambda message: None,
    records: str | Path | None = None,
    kv: str | None = None,
) -> Built:
    """Compiles a GPT-2 checkpoint and writes an artifact.

    Args:
        model: a published size ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), a folder with a checkpoint, a Hugging
            Face hub id, "demo" (the small model that comes with tvm_attn), an ONNX file of GPT-2, or the result of
            `open_weights`.
        target: "cpu" for this machine, or names of targets, separated by commas; see `targets.resolve_all`.
        dtype: storage of weights, and of the KV cache unless `kv` is given: "float32", "float16" or "bfloat16". Sums
            are always float32.
        quant: "none", "int8" or "int4": matrices with a scale for every 32 weights, multiplied as integers.
        draft: "int8" or "int4": the artifact also holds a copy with this quantization, for processors, which guesses
            tokens; see `tvm_attn.runtime.speculation`. It is an artifact of its own in the folder "draft".
        out: the artifact's folder; default `dist/<model's name>`. An artifact there is replaced once the build has
            succeeded; anything else there is an error.
        verify: compare the compiled functions with PyTorch; if it is not installed, a note says so. The weights of an
            ONNX file are also compared with the file itself in ONNX Runtime, if that is installed.
        random_weights: use random weights of the model's size instead of its own; see `open_weights`.
        progress: called with a message before each step.
        records: a folder of tuned records, `TARGET/*.jsonl` or `*.jsonl`, that come before all others.
        kv: "int8" for a KV cache of half of the size of 16 bits: a scale for every head and position. None for `dtype`.

    Raises:
        CheckpointError, ConfigError, TokenizerError: the checkpoint is not usable.
        TargetError, ScheduleError, CompileError: it cannot be compiled for the target.
        OnnxError: the ONNX file does not hold GPT-2.
        VerificationError: the compiled functions disagree with PyTorch, or the weights with the ONNX file.
        ArtifactError: `out` cannot be written.
    """
    resolved = targets.resolve_all(target, dtype)
    kv = None if kv == dtype else kv
    _check_choices(resolved, dtype, quant, kv)
    drafting = _check_draft(resolved, dtype, quant, draft)
    books = {entry.name: RecordBook.load(entry, None if records is None else Path(records)) for entry in resolved}
    progress("reading the checkpoint")
    weights = model if isinstance(model, Weights) else open_weights(model, random_weights, progress)
    notes = [*weights.notes]
    for kind in (quant, draft or quant):
        stored_types(weights.config, dtype, kind)  # refuses what cannot be quantized, before minutes of work
    check_cache(weights.config, kv)
    if verify and isinstance(weights.checkpoint, OnnxCheckpoint):
        progress("the file in ONNX Runtime")
        notes.append(compare_with_file(weights.checkpoint))
    folder = Path(out) if out is not None else Path("dist") / weights.name
    writer = _Writer(weights, books, verify, notes, progress)
    with artifact_folder(folder) as temporary:
        if draft is not None:
            (temporary / DRAFT).mkdir()
            writer.write(temporary / DRAFT, drafting, (dtype, draft, None), "of the draft")
        reports, sources = writer.write(temporary, resolved, (dtype, quant, kv))
    return Built(folder, weights.source, reports, tuple(notes), sources)


@dataclass(frozen=True)
class _Writer:
    """Writes artifacts of the same weights.

    Attributes:
        weights: the weights.
        books: the tuned records of each target.
        verify: whether to compare libraries with PyTorch.
        notes: receives what the user should know.
        progress: told what is being done.
    """

    weights: Weights
    books: dict[str, RecordBook]
    verify: bool
    notes: list[str]
    progress: Callable[[str], None]

    def write(
        self, folder: Path, resolved: list[Target], types: tuple[str, str, str | None], label: str = ""
    ) -> tuple[dict[str, Report | None], dict[str, Sources]]:
        """Writes an artifact of a dtype, quantization and dtype of the KV cache.

        Returns:
            The report and the schedules' sources of each target.
        """
        (dtype, quant, kv), weights, sources = types, self.weights, {}
        self.progress(f"writing the parameters {label}".rstrip())
        write_params(folder, packed_first(stored_params(weights.params(), dtype, quant)))
        tokenizer = weights.tokenizer_json()
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        body = _manifest(weights, dtype, quant, kv)
        for entry in resolved:
            self.progress(f"compiling for {entry.name} {label}".rstrip())
            book = self.books[entry.name]
            described, planned = _compile(weights.config, entry, (dtype, quant, kv), folder, self.progress, book)
            body["libraries"].append(described)
            sources[entry.name] = Sources.of(planned)
        write_manifest(folder, body)
        reports: dict[str, Report | None] = {}
        if self.verify:
            reports = _verify_libraries(folder, resolved, weights, body, self.notes, self.progress, label)
            write_manifest(folder, body)
        return reports or dict.fromkeys((entry.name for entry in resolved), None), sources


def _check_draft(resolved: list[Target], dtype: str, quant: str, draft: str | None) -> list[Target]:
    """The targets that a draft is compiled for.

    Raises:
        TargetError: there are none, or the draft would not have fewer bits than the model.
    """
    if draft is None:
        return []
    drafting = [entry for entry in resolved if entry.device == "cpu"]
    if not drafting:
        raise TargetError("a draft is for processors, and no target is one; leave --draft out, or add --target cpu")
    smaller = {"none": ("int8", "int4"), "int8": ("int4",)}.get(quant, ())
    if draft not in smaller:
        fitting = " or ".join(smaller) or "none"
        raise TargetError(f"a draft has fewer bits than the model ({dtype}, {quant}), not {draft}; possible: {fitting}")
    _check_choices(drafting, dtype, draft, None)
    return drafting


def _check_choices(resolved: list[Target], dtype: str, quant: str, kv: str | None) -> None:
    if len({entry.name for entry in resolved}) != len(resolved):
        raise TargetError("a target is named twice")
    for entry in resolved:
        check_types(entry, dtype, quant, kv)
        backend_for(entry).tvm_target(entry)


def _manifest(weights: Weights, dtype: str, quant: str, kv: str | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": weights.config.to_dict(),
        "generation": weights.generation,
        "weights": weights.source,
        "dtype": dtype,
        "quantization": quant,
        "kv": kv,
        "versions": {"tvm_attn": tvm_attn.__version__, "tvm": tvm.__version__, "tvm_ffi": tvm_ffi.__version__},
        "date": date.today().isoformat(),
        "libraries": [],
    }


def _compile(
    config: GPT2Config,
    target: Target,
    types: tuple[str, str, str | None],
    folder: Path,
    progress: Callable[[str], None],
    book: RecordBook,
) -> tuple[dict[str, Any], dict[str, Planned]]:
    """Compiles the library of one target: what the manifest says of it, and the schedules of its kernels.

    `types` are the storage dtype, the quantization, and the dtype of the KV cache if it is another one.
    """
    dtype, quant, kv = types
    layout = layout_for(config, target, dtype, quant, kv)
    program = build_program(config, layout)
    library = Library(
        file=f"lib-{target.name}.so",
        target=target.name,
        device=target.device,
        platform=f"linux-{target.architecture}",
        features=target.features,
        rows=layout.rows,
        vocabulary=padded_vocabulary(config, layout),
        max_prefill_rows=layout.whole_groups(config.n_positions),
        max_batch=MAX_BATCH,
        parameters=tuple(program.parameters),
        architectures=target.architectures if isinstance(target, CudaTarget) else (),
        ptx=target.ptx if isinstance(target, CudaTarget) else None,
    )
    _add_identity(program, identity(config, dtype, quant, layout.cache, library))
    planned = compile_program(program, target, folder / library.file, progress, book)
    described = asdict(library) | {
        "hardware": target.to_table(),
        "records": [entry.record.to_line() for entry in planned.values() if entry.record],
        "schedules": {name: entry.source for name, entry in planned.items() if entry.source},
        "kernels": {name: shape_of(kernel) for name, kernel in program.kernels.items()},
        "verification": None,
    }
    return described, planned


def _add_identity(program: Program, text: str) -> None:
    """Adds a function "identity" that returns the text; see `tvm_attn.runtime.artifact.identity`."""
    function = relax.Function([], tvm.ir.StringImm(text), is_pure=True)
    program.module["identity"] = function.with_attr("global_symbol", "identity")


def _verify_libraries(
    folder: Path,
    resolved: list[Target],
    weights: Weights,
    body: dict[str, Any],
    notes: list[str],
    progress: Callable[[str], None],
    label: str,
) -> dict[str, Report | None]:
    if find_spec("torch") is None:
        if label:
            return {}
        notes.append("not checked: PyTorch is not installed; pip install torch, then tvm-attn verify")
        return {}
    reports: dict[str, Report | None] = {}
    for target, library in zip(resolved, Artifact(folder).libraries, strict=True):
        if obstacle := library.obstacle() or device_obstacle(target, body["dtype"], body["quantization"]):
            reports[target.name] = None
            notes.append(
                f"{library.file} was compiled but not checked: {obstacle}; run tvm-attn verify on its hardware"
            )
            continue
        artifact = Artifact(folder)
        device = tvm.runtime.device(library.device, 0)
        engine = CompiledEngine(artifact, library, device, min(VERIFY_BATCH, library.max_batch))
        report = verify(artifact, engine, progress)
        report.raise_if_failed(library.file)
        reports[target.name] = report
        entry = body["libraries"][len(reports) - 1]
        entry["verification"] = report.to_dict()
        if artifact.quantization != "none" or artifact.quantized_kv:
            progress("accuracy of the quantized model")
            accuracy = measure_accuracy(weights.config, weights.params(), engine, weights.tokenizer_json())
            entry["accuracy"] = accuracy.to_dict()
            notes.append(f"{target.name}{label and ', draft'}: {accuracy.summary()}")
    return reports
