"""The device classes that this project knows: the one list of them.

Each class is a module of its name in `tvm_attn.targets` (what hardware files say), `tvm_attn.runtime.devices` (finding
and using devices) and `tvm_attn.compiler.devices` (making libraries for them). CONTRIBUTING.md, "Adding a backend".
"""

BACKENDS = ("cpu", "cuda", "vulkan")
"""`"auto"` tries the GPUs in this order, then the processor."""
