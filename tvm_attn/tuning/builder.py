"""A worker that compiles candidates, and writes the inputs that they are measured with.

    python -m tvm_attn.tuning.builder

| request | does | answer |
|---|---|---|
| `{"calls": FOLDER, "kernel": SHAPE}` | writes the kernel's calls, see `tvm_attn.tuning.cases` | `{}` |
| `{"library": FILE, "kernel": SHAPE, "target": NAME, "decisions": {...}}` | compiles a candidate | `{}` |
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tvm_attn import targets
from tvm_attn.compiler.single_kernel import compile_kernel
from tvm_attn.kernels import FAMILIES, Kernel
from tvm_attn.schedule import schedule
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.cases import write_calls
from tvm_attn.tuning.process import serve


def kernel_from(shape: dict[str, Any]) -> Kernel:
    """The kernel that `shape_of` described."""
    family = next(family for family in FAMILIES if family.family == shape["family"])
    return family(**{name: value for name, value in shape.items() if name != "family"})


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """Does what a request says."""
    kernel = kernel_from(request["kernel"])
    if "calls" in request:
        write_calls(calls_of(kernel), Path(request["calls"]))
        return {}
    target = targets.resolve(request["target"])
    function = schedule(kernel, target, request["decisions"])
    library = Path(request["library"])
    # Under its own name it is complete: the search looks for the file.
    temporary = library.with_name(f"part-{os.getpid()}-{library.name}")
    compile_kernel(function, target, temporary)
    temporary.replace(library)
    return {}


if __name__ == "__main__":
    serve(handle)
