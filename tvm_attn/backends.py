"""The one list of the device classes that this project supports.

Each class has a module of its name in `tvm_attn.targets` (what hardware files say), `tvm_attn.runtime.devices` (finding
and using devices) and `tvm_attn.compiler.devices` (building libraries for them). See "Adding a backend" in
CONTRIBUTING.md.
"""

BACKENDS = ("cpu", "cuda", "vulkan")
"""`"auto"` tries the GPUs in this order, then the processor."""
