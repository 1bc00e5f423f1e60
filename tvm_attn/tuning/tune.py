"""A search from beginning to end: the device, the kernels, the candidates, whole calls, the records."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tvm_attn import targets
from tvm_attn.compiler.build import build
from tvm_attn.compiler.devices import layout_for
from tvm_attn.config import GPT2Config
from tvm_attn.errors import DeviceError, TuningError
from tvm_attn.model.checkpoint import RANDOM_SOURCE
from tvm_attn.model.gpt2 import build_program
from tvm_attn.model.layout import check_types
from tvm_attn.model.weights import Weights, open_config
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.machine import usable_cores
from tvm_attn.schedule import Record, RecordBook
from tvm_attn.schedule.records import record_key
from tvm_attn.targets import CpuTarget, Peak, Target
from tvm_attn.tuning import batch
from tvm_attn.tuning.measurements import CALM, Measurement, Measurements
from tvm_attn.tuning.records import merge, records_folder, require_mergeable
from tvm_attn.tuning.search import Place
from tvm_attn.tuning.tuner import (
    Found,
    Options,
    Progress,
    Task,
    Tuned,
    check_target,
    earlier_decisions,
    found_of,
    local_place,
    plan_tasks,
    remote_place,
    search,
    work_folder,
    workload_of,
)
from tvm_attn.tuning.whole import Systems, Verdict, cases_of, judge

DEVICES = ("auto", "cpu", "cuda", "vulkan")
"""What `--target` may say for this machine's device. One for which there is no target file gets one when it is used."""


def tune(
    model: str | Path | GPT2Config = "gpt2",
    target: str | Path = "auto",
    dtype: str = "float32",
    quant: str = "none",
    kernels: Sequence[str] | None = None,
    out: str | Path | None = None,
    work: str | Path | None = None,
    options: Options = Options(),  # noqa: B008
    whole_calls: bool = True,
    progress: Callable[[Progress], None] = lambda progress: None,
    step: Callable[[str, float], None] = lambda message, share: None,
) -> Tuned:
    """Searches the schedule templates' decisions for a model on this machine, and writes tuned records.

    Args:
        model: as in `tvm_attn.build`, or a configuration; only its sizes matter.
        target: "auto", "cpu", "cuda" or "vulkan" for this machine's device, see `find_target`, or the name or file
            of a target that fits it.
        dtype: storage of weights and KV cache.
        quant: quantization of the weights.
        kernels: kernel families to search; default all.
        out: folder to write records to; default the user's own, from which builds read them.
        work: folder that keeps measurements, so that a search continues where it stopped; default in the user's cache.
        options: how to search.
        whole_calls: build the model with and without the new records, and keep those with which no call is slower.
        progress: called after each candidate.
        step: called with a description of each later step, and the share of it that is done.

    Returns:
        What was found. Ctrl-C ends the search early: nothing is written, and the same search continues from there.

    Raises:
        TargetError: the target is unknown or does not fit this machine, or does not have the dtype or quantization.
        TuningError: an argument is wrong, no candidate could be measured, or other programs used the machine meanwhile.
        CheckpointError, ConfigError: the model is unknown.
        ScheduleError: a kernel has no template, or a record file is malformed.
    """
    config = model if isinstance(model, GPT2Config) else open_config(model)
    return Job(config, str(target), dtype, quant, kernels, out, work, options).run(
        progress, step, whole_calls=whole_calls
    )


def find_target(named: str) -> Target:
    """The target that `--target` names, here also this machine's device.

    "auto" is the first GPU that is no software renderer, else the processor.

    Raises:
        TargetError, DeviceError: there is no such target or device.
    """
    if named not in DEVICES:
        return targets.resolve(named)
    kind = named
    if kind == "auto":
        usable = [name for name in ("cuda", "vulkan") if device_class(name).obstacle() is None]
        kind = next((name for name in usable if not device_class(name).is_software()), "cpu")
    if reason := device_class(kind).obstacle():
        raise DeviceError(f"this machine has no {kind} device: {reason}")
    return targets.detect(kind)


class Job:
    """A search with all its arguments; see `tune`.

    Raises:
        TargetError, TuningError, ScheduleError: see `tune`.
    """

    def __init__(
        self,
        config: GPT2Config,
        target: str,
        dtype: str,
        quant: str,
        kernels: Sequence[str] | None = None,
        out: str | Path | None = None,
        work: str | Path | None = None,
        options: Options = Options(),  # noqa: B008
    ) -> None:
        if options.trials < 1:
            raise TuningError(f"the number of trials must be positive, not {options.trials}")
        self.config, self.dtype, self.quant, self.options = config, dtype, quant, options
        self.target: Target = find_target(target)
        check_types(self.target, dtype, quant)
        self.named = target if target.endswith(".toml") else self.target.name
        self._families = kernels
        self.folder = records_folder(out, self.target.name)
        self.work = Path(work) if work is not None else work_folder(self.target.name)

    def _describe(self, step: Callable[[str, float], None]) -> None:
        """Writes a target file for a device that has none, with its measured limits: other processes read it."""
        if self.named.endswith(".toml") or self.target.name in targets.names():
            return
        self.tasks  # noqa: B018  (refuses what cannot be searched before anything is measured or written)
        if isinstance(self.target, CpuTarget):
            from tvm_attn.benchmark.probe import measure_limits

            step("measuring the limits of this processor", 0.0)
            limits = measure_limits(self.target, usable_cores())
            peak = Peak(round(limits.float32_gflops, 1), round(limits.read_gbytes, 1))
            self.target = replace(self.target, peak=peak)
            del self.tasks  # which are planned for this target
        file = targets.user_folder() / f"{self.target.name}.toml"
        targets.write(self.target, file)
        step(f"described this device in {file}", 0.0)

    @cached_property
    def tasks(self) -> list[Task]:
        """The kernels to search."""
        layout = layout_for(self.config, self.target, self.dtype, self.quant)
        return plan_tasks(build_program(self.config, layout), self.target, self._families)

    def known(self, task: Task, place: Place | None = None) -> list[Measurement]:
        """What was measured of a kernel before, on this machine's device unless another place is given."""
        workload = workload_of(task.space, place or local_place(self.target))
        return list(Measurements(self.work).known(workload).values())

    def remote(self, tracker: str, key: str) -> Place:
        """The devices behind TVM's RPC; see `remote_place`."""
        return remote_place(self.target, tracker, key)

    def run(
        self,
        progress: Callable[[Progress], None],
        step: Callable[[str, float], None],
        place: Place | None = None,
        whole_calls: bool = True,
    ) -> Tuned:
        """Searches and writes records; see `tune`. `place` is another device than this machine's."""
        if place is None:
            check_target(self.target, self.dtype, self.quant)
        require_mergeable(self.folder)
        self._describe(step)
        tasks = self.tasks
        where = place or local_place(self.target)
        tuned = search(tasks, self.target, self.named, where, self.work, self.options, progress)
        if tuned.interrupted or not tuned.found:
            return tuned
        require_calm(tuned.found, self.options.force)
        records = [found.record for found in tuned.found if found.gain is None or found.gain > 1]
        verdict = None
        if whole_calls and records:
            verdict = self._judge(tuned.found, records, where.device, step)
            records = list(verdict.kept)
        return replace(tuned, verdict=verdict, files=tuple(merge(self.folder, records)) if records else ())

    def _judge(
        self, found: Sequence[Found], records: Sequence[Record], device: str, step: Callable[[str, float], None]
    ) -> Verdict:
        gains = {entry.record.key: entry.gain or 1.0 for entry in found}
        called = {record_key(task.space.template, task.space.kernel): set(task.functions) for task in self.tasks}
        with self._models() as build_with:
            step("building the model with the records of before", 0.0)
            systems = Systems(build_with(()), build_with, device, usable_cores())
            return judge(systems, cases_of(self.config), records, gains, called, step)

    @contextmanager
    def _models(self) -> Iterator[Callable[[Sequence[Record]], Path]]:
        """A function that builds the model, with random weights and with records that come before all others."""
        weights, count = Weights("tuned", self.config, RANDOM_SOURCE, None), 0
        with tempfile.TemporaryDirectory(prefix="whole-", dir=self.work) as folder:

            def build_with(records: Sequence[Record]) -> Path:
                nonlocal count
                count += 1
                place, artifact = Path(folder) / f"records-{count}", Path(folder) / f"artifact-{count}"
                merge(place, records)
                given = place if records else None
                build(weights, self.named, self.dtype, self.quant, artifact, verify=False, records=given)
                if count > 2:
                    shutil.rmtree(Path(folder) / f"artifact-{count - 1}", ignore_errors=True)
                return artifact

            yield build_with

    def export(self, folder: Path, step: Callable[[str, float], None]) -> int:
        """Writes a batch for another machine; see `batch.export`."""
        self._describe(step)
        return batch.export(self.tasks, self.target, self.named, self.work, self.options.trials, folder, step)

    def import_results(self, file: Path) -> Tuned:
        """Reads the results of a batch, and writes the records that they give; see `batch.import_results`."""
        require_mergeable(self.folder)
        added = batch.import_results(file, self.tasks, self.target, self.work)
        log, place = Measurements(self.work), batch.place_of(self.target)
        book = RecordBook.load(self.target)
        found, skipped = list[Found](), list[str]()
        for task in self.tasks:
            known = list(log.known(workload_of(task.space, place)).values())
            entry = found_of(task, known, earlier_decisions(task.space, book))
            if entry is None:
                skipped.append(task.name)
            else:
                found.append(entry)
        if not found:
            raise TuningError("no candidate has a time: see the errors in the results")
        require_calm(found, self.options.force)
        records = [entry.record for entry in found if entry.gain is None or entry.gain > 1]
        files = merge(self.folder, records) if records else []
        notes = (f"{added} new measurements", "whole calls were not compared: that needs the device")
        return Tuned(self.target.name, tuple(found), tuple(skipped), self.work, False, notes, None, tuple(files))


def require_calm(found: Sequence[Found], force: bool) -> None:
    """Checks that other programs left the machine alone while the best candidates were measured.

    Raises:
        TuningError: they did not, and `force` is not set.
    """
    busy = [entry for entry in found if entry.load is not None and entry.load > CALM]
    if busy and not force:
        most = max(entry.load or 0.0 for entry in busy)
        raise TuningError(
            f"other programs used up to {most:.1f} cores while {len(busy)} of {len(found)} kernels were measured, so "
            "no record is written; the same command measures the best ones again, and --force writes them as they are"
        )
