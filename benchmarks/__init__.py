"""Measurements that a user of tvm_attn does not need: other runtimes, evidence for GPUs, bundles, committed results.

Run from a checkout, e.g. `python -m benchmarks.compare`; not part of the wheel, and never imported by `tvm_attn`.
"""
