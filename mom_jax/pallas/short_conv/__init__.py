"""Short convolution of grouped rows, SiLU and l2 norm; see api.py."""
