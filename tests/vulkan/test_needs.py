"""What libraries record that they need of a device, and what `features_needed` says before they are compiled."""

from pathlib import Path
from typing import Any

import pytest

from tvm_attn import targets
from tvm_attn.compiler.devices import layout_for
from tvm_attn.compiler.pipeline import compile_program
from tvm_attn.config import GPT2Config
from tvm_attn.model.gpt2 import build_program
from tvm_attn.runtime.devices.vulkan import features_needed
from tvm_attn.vulkan.codegen import build, parse

SMALL = GPT2Config(vocab_size=300, n_positions=40, n_embd=64, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "dtype", "quant", "expected"),
    [
        ("vulkan-generic", "float32", "none", set()),
        slow("vulkan-generic", "float16", "none", {"float16", "storage16"}),
        slow("vulkan-generic", "float32", "int8", {"float16", "storage16", "int8", "storage8"}),
        slow("vulkan-generic", "float16", "int4", {"float16", "storage16", "int8", "storage8"}),
        slow("vulkan-matrix", "float32", "none", {"subgroup_shuffle"}),
        slow(
            "vulkan-matrix",
            "float16",
            "none",
            {"float16", "storage16", "subgroup_shuffle", "cooperative_matrix", "vulkan_memory_model"},
        ),
    ],
)
def test_a_library_needs_what_the_inventory_says(
    name: str, dtype: str, quant: str, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, nothing that Vulkan 1.3 makes optional: no 64-bit integers, no 16-bit types, no subgroups."""
    records: list[dict[str, Any]] = []
    emit = build.__globals__["emit"]

    def keep(mod: Any) -> bytes:
        blob: bytes = emit(mod)
        records.extend(record for record, _ in parse(blob))
        return blob

    monkeypatch.setitem(build.__globals__, "emit", keep)
    target = targets.read(name)
    assert isinstance(target, targets.GpuTarget)
    program = build_program(SMALL, layout_for(SMALL, target, dtype, quant), 48, 8)
    compile_program(program, target, tmp_path / "lib.so")
    assert {feature for record in records for feature in record["features"]} == expected
    assert features_needed(target, dtype, quant) == expected
    assert {record["subgroup_size"] for record in records} <= {None, target.subgroup}
    assert max(record["shared_bytes"] for record in records) <= target.shared_bytes
    for record in records:
        x, y, z = record["workgroup_size"]
        assert x * y * z <= target.max_threads
