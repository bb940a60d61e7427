"""What `spgen autotune` does with the compiler: calls of workloads, their kernels, and the search over them.

The search, the model and the records (spgen/autotune) know neither patterns nor kernels; here they meet.
"""
