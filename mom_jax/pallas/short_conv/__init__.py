"""Short convolution of grouped rows, SiLU and unit heads; see api.py."""
