"""Products with sparse weights on CPUs: templates that render code for TVM's IR builder."""
