"""Checking and measuring on an NVIDIA GPU, without TVM's compiler; `python -m benchmarks.gpu` runs all of it."""
