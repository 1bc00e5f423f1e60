"""Measures compiled models: the machine's limits, whole calls, and single kernels."""
