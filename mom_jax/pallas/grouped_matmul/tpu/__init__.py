"""The Pallas kernels of grouped_matmul for TPUs."""
