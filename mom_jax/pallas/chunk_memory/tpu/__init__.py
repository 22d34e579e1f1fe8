"""The Pallas kernels of chunk_memory for TPUs."""
