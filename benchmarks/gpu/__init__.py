"""Checks and measurements on an NVIDIA GPU, without TVM's compiler; `python -m benchmarks.gpu` runs all of them."""
