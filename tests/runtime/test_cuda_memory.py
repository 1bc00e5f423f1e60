"""How much device memory a model is said to need, against what it allocates, and the error if that is too much."""

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_attn
from tvm_attn.config import PRESETS, GPT2Config
from tvm_attn.errors import DeviceError
from tvm_attn.runtime import engine as engine_module
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.devices import class_of, device_class
from tvm_attn.runtime.memory import RESERVE, MemoryNeeds, memory_needs
from tvm_attn.storage import stored_types

MIB = 1 << 20


def size(tensor: Any) -> int:
    return prod(tensor.shape) * np.dtype(str(tensor.dtype)).itemsize


def test_parameters_and_cache_are_counted_exactly(demo_artifact: Path) -> None:
    artifact = Artifact(demo_artifact)
    engine = tvm_attn.load(demo_artifact, max_batch=3).engine
    needs = memory_needs(artifact, engine.library, 3)
    assert needs.parameters == sum(size(tensor) for tensor in engine._params)
    assert 3 * needs.cache_slot == sum(size(tensor) for tensor in engine._kv)
    assert needs.packing == max(size(artifact.parameters.read(name)) for name in artifact.parameters.names())


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_published_model(demo_artifact: Path, quantization: str) -> None:
    """124M in float16, by hand: 124,439,808 parameters; 12 layers of keys and values of 1024 positions, 768 wide."""
    artifact = Artifact(demo_artifact)
    artifact.config, artifact.dtype, artifact.quantization = PRESETS["gpt2"], "float16", quantization
    library = replace(artifact.libraries[0], vocabulary=50264, rows=8, max_prefill_rows=1024)
    needs = memory_needs(artifact, library, 8)
    assert needs.cache_slot == 12 * 2 * 1024 * 768 * 2
    vectors = 12 * (4 * 768 + 2304 + 768 + 3072 + 768) + 2 * 768
    matrices = 12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 50264 * 768
    bits = {"none": 16, "int8": 8 + 16 / 32, "int4": 4 + 16 / 32}[quantization]
    assert needs.parameters == matrices * bits / 8 + 1024 * 768 * 2 + vectors * 4


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_activations_hold_what_the_planner_places(tensor_cores: bool) -> None:
    """The memory planner's storages and the logits, of every function."""
    import tvm
    from tvm import relax

    from tvm_attn.model.gpt2 import build_program
    from tvm_attn.model.layout import Layout

    config = GPT2Config.from_dict({**PRESETS["gpt2"].to_dict(), "n_layer": 2, "vocab_size": 999})
    rows, batch = 1024, 64
    dtype = "float16" if tensor_cores else "float32"
    columns = 1 if tensor_cores else 64
    layout = Layout(8, columns, dtype, dtype, fuse_layers=False, group_kernels=tensor_cores, activations=dtype)
    module = build_program(config, layout, rows, batch).module
    passes = ("ToNonDataflow", "RemovePurityChecking", "CallTIRRewrite", "StaticPlanBlockMemory")
    module = tvm.transform.Sequential([getattr(relax.transform, name)() for name in passes])(module)
    placed = {}
    for name in ("prefill", "logits", "decode", "decode_one", *(["step", "step_group"] if tensor_cores else [])):
        sizes = re.findall(r"alloc_storage\(R\.shape\(\[(\d+)\]\)", module[name].script())
        assert sizes and "alloc_storage(R.shape([s" not in module[name].script()
        placed[name] = sum(map(int, sizes)) + 4 * 1024 * (rows if name == "logits" else batch)
    needs = MemoryNeeds(0, 0, 1, _activations(config, rows, batch, vocabulary=1024), batch)
    # What one function has allocated goes to the pool, where the next one finds it.
    assert max(placed.values()) <= needs.activations <= 3 * max(placed.values())
    assert needs.activations >= placed["logits"] + placed["decode"]


def _activations(config: GPT2Config, rows: int, batch: int, vocabulary: int) -> int:
    class Fake:
        pass

    artifact, library = Fake(), Fake()
    artifact.__dict__ = {"config": config, "dtype": "float32", "types": stored_types(config, "float32", "none")}
    library.__dict__ = {"vocabulary": vocabulary, "rows": 8, "max_prefill_rows": rows}
    return memory_needs(artifact, library, batch).activations  # type: ignore[arg-type]


def needs(max_batch: int) -> MemoryNeeds:
    return MemoryNeeds(
        parameters=512 * MIB, packing=100 * MIB, cache_slot=256 * MIB, activations=448 * MIB, max_batch=max_batch
    )


def test_enough_memory_is_silent() -> None:
    assert needs(4).total == (512 + 448 + 4 * 256) * MIB + RESERVE
    needs(4).require(needs(4).total, "cuda:0")


@pytest.mark.parametrize(
    ("max_batch", "free", "message"),
    [
        (
            4,
            2047 * MIB,
            "cuda:0 has 2.00 GiB of free memory but the model needs 2.00 GiB (parameters 0.50 GiB, KV cache of 4 "
            "slots 1.00 GiB, activations 0.44 GiB, reserve 0.06 GiB); lower max_batch to 3",
        ),
        (
            64,
            2048 * MIB,
            "KV cache of 64 slots 16.00 GiB, activations 0.44 GiB, reserve 0.06 GiB); lower max_batch to 4",
        ),
        (64, 1280 * MIB, "lower max_batch to 1"),
        (64, 1279 * MIB, "free some, or build with --quant int8 or int4"),
        (1, 0, "has 0.00 GiB of free memory but the model needs 1.25 GiB"),
    ],
)
def test_too_little_memory(max_batch: int, free: int, message: str) -> None:
    with pytest.raises(DeviceError) as caught:
        needs(max_batch).require(free, "cuda:0")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_advice_is_enough() -> None:
    for free in range(1280 * MIB, 4096 * MIB, 111 * MIB):
        with pytest.raises(DeviceError) as caught:
            needs(64).require(free, "cuda:0")
        slots = int(str(caught.value).rpartition(" ")[2])
        needs(slots).require(free, "cuda:0")
        with pytest.raises(DeviceError):
            needs(slots + 1).require(free, "cuda:0")


def test_loading_stops_before_anything_is_allocated(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(device_class("cpu"), "free_memory", lambda device: 90 * MIB)
    monkeypatch.setattr(engine_module.CompiledEngine, "_pack", fail)
    monkeypatch.setattr(engine_module.CompiledEngine, "_new_cache", fail)
    with pytest.raises(
        DeviceError, match=r"^cpu:0 has 0\.09 GiB of free memory but the model needs .* lower max_batch to \d+$"
    ):
        tvm_attn.load(demo_artifact, max_batch=64)


def test_free_memory_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        index = 3

        def __init__(self, kind: int, free: int | None) -> None:
            self._kind, self.available_global_memory = kind, free

        def dlpack_device_type(self) -> int:
            return self._kind

    def free(kind: int, given: int | None) -> int | None:
        device = Device(kind, given)
        return class_of(device).free_memory(device)

    selected: list[int] = []
    monkeypatch.setattr("tvm_attn.runtime.devices.cuda.select", selected.append)
    assert free(1, 5) is None
    assert free(7, 5) == 5  # Vulkan
    assert free(7, None) is None
    assert selected == []
    # TVM asks CUDA for the current device's memory, whatever the index.
    assert free(2, 5) == 5
    assert selected == [3]
