"""Triton source of the level-3 kernels, for CUDA and HIP devices."""
