"""The Triton kernels of grouped_matmul for NVIDIA GPUs."""
