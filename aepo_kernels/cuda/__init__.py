"""Launchers of the CUDA C++ kernels (csrc/cuda/) that the compiled extension holds where nvcc built them."""
