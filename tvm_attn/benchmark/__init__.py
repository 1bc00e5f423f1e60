"""Measuring compiled models: the machine's limits, whole calls, kernels, and other runtimes on the same weights."""
