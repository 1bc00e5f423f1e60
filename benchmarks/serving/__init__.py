"""Load tests of `tvm-attn serve`; see `__main__.py`."""
