"""What turns a level-3 kernel into something that runs: TVM for CPUs, Triton for GPUs."""
