"""CPU kernels: templates that render code for TVM's IR builder."""
