"""Names of TVM that the sources use: mypy knows none of its types, and annotations are not evaluated when they run."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tvm
from tvm import ir, relax, s_tir, tirx

import benchmarks
import tvm_attn

MODULES: dict[str, ModuleType] = {"ir": ir, "relax": relax, "s_tir": s_tir, "tirx": tirx, "tvm": tvm}
PACKAGE = Path(tvm_attn.__file__).parent
SOURCES = sorted([*PACKAGE.rglob("*.py"), *Path(benchmarks.__file__).parent.rglob("*.py")])


def imported_modules(tree: ast.AST) -> dict[str, ModuleType]:
    """Those of MODULES that a file imports from TVM."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    statements += [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "tvm"]
    names = {alias.name for node in statements for alias in node.names}
    return {name: module for name, module in MODULES.items() if name in names}


def missing_names(tree: ast.AST) -> Iterator[str]:
    """Every `module.name`, however deep, that the module does not have."""
    modules = imported_modules(tree)

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return modules.get(node.id)
        return getattr(value(node.value), node.attr, None) if isinstance(node, ast.Attribute) else None

    for node in ast.walk(tree):
        module = value(node.value) if isinstance(node, ast.Attribute) else None
        if isinstance(module, ModuleType) and not hasattr(module, node.attr):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_names_exist(path: Path) -> None:
    assert not set(missing_names(ast.parse(path.read_text(encoding="utf-8"))))


def test_missing_names_are_found() -> None:
    source = "import tvm\nfrom tvm import tirx\ndef f(x: tirx.PrimExpr) -> tvm.runtime.Nothing: tirx.Var"
    assert set(missing_names(ast.parse(source))) == {"tirx.PrimExpr", "tvm.runtime.Nothing"}
