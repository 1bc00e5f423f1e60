"""Every device class of the one list has the modules that CONTRIBUTING.md, "Adding a backend", names."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

from tvm_attn import targets
from tvm_attn.backends import BACKENDS
from tvm_attn.compiler.devices import backend_for
from tvm_attn.compiler.devices.base import Backend
from tvm_attn.kernels import FAMILIES
from tvm_attn.runtime.devices import class_of, device_class, device_classes

PACKAGE = Path(__file__).parents[1] / "tvm_attn"


@pytest.mark.parametrize("kind", BACKENDS)
def test_modules_of_a_backend(kind: str) -> None:
    target_class = import_module(f"tvm_attn.targets.{kind}").TARGET_CLASS
    shipped = [target for target in targets.read_all() if target.device == kind]
    assert shipped and all(type(target) is target_class for target in shipped)
    assert device_class(kind).kind == kind
    assert all(isinstance(backend_for(target), Backend) for target in shipped)
    templates = import_module(f"tvm_attn.kernels.{target_class.KERNELS}").TEMPLATES
    assert {family for template in templates for family in template.families} <= {kernel.family for kernel in FAMILIES}


def test_devices_are_told_apart_by_their_number() -> None:
    import tvm

    assert len({found.dlpack for found in device_classes()}) == len(BACKENDS)
    assert class_of(tvm.cpu()).kind == "cpu"


@pytest.mark.parametrize("kind", [kind for kind in BACKENDS if kind != "cpu"])
def test_only_its_own_modules_compare_with_its_name(kind: str) -> None:
    """The rest asks the class: a comparison would have to be found and extended for the next one."""
    found = []
    for folder in ("runtime", "compiler", "model", "schedule", "tuning"):
        for path in (PACKAGE / folder).rglob("*.py"):
            if kind in path.stem:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                sides = (node.left, *node.comparators) if isinstance(node, ast.Compare) else ()
                if any(isinstance(side, ast.Constant) and side.value == kind for side in sides):
                    found.append(f"{path}:{node.lineno}")
    assert not found
