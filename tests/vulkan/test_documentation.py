"""docs/vulkan.md: its program is run unchanged, in its own process, with no imports except those that it shows."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tvm_attn import vulkan as backend

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "vulkan.md").read_text(encoding="utf-8")


def test_program_of_your_own(listed: dict[str, Any], tmp_path: Path) -> None:
    if not listed["features"]["int64"]:
        pytest.skip("its symbolic length is an int64")
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    assert "tvm_attn" not in blocks[0]
    path = tmp_path / "program.py"
    path.write_text("\n".join(blocks) + "\nprint('checked')\n", encoding="utf-8")
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["checked"], done.stderr
    assert "Vulkan validation:" not in done.stderr


def test_every_environment_variable_is_documented() -> None:
    sources = [*(ROOT / "tvm_attn" / "vulkan" / "src").glob("*.cc"), ROOT / "hatch_build.py"]
    used = {name for path in sources for name in re.findall(r"TVM_ATTN_\w+(?=\")", path.read_text(encoding="utf-8"))}
    used = {name for name in used if name.startswith(("TVM_ATTN_VULKAN_", "TVM_ATTN_BUILD_"))}
    assert used == {"TVM_ATTN_VULKAN_DEVICE", "TVM_ATTN_VULKAN_VALIDATE", "TVM_ATTN_BUILD_VULKAN"}
    for name in used:
        assert f"`{name}" in TEXT


def test_device_needs_are_documented() -> None:
    source = (ROOT / "tvm_attn" / "vulkan" / "src" / "physical_device.cc").read_text(encoding="utf-8")
    start = source.index("void RequireFeatures")
    features = re.findall(r'"(\w+)"', source[start : source.index("PhysicalDevice Query", start)])
    assert len(features) == 5
    for feature in features:
        assert f"`{feature}`" in TEXT
    assert set(backend.__doc__.split()) >= {"`TVM_ATTN_VULKAN_DEVICE`", "`TVM_ATTN_VULKAN_VALIDATE=1`"}
