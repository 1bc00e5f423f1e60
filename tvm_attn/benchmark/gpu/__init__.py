"""Checking and measuring on an NVIDIA GPU, where TVM's compiler need not be; `benchmarks/gpu.py` runs all of it."""
