"""The Triton kernels of chunk_memory for NVIDIA GPUs."""
