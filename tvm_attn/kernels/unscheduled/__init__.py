"""TensorIR without a schedule, from which the templates of processors and of GPUs both start, one file a family."""
