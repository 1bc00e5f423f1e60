"""TensorIR without a schedule, from which the templates of both processors and GPUs start, one file per family."""
