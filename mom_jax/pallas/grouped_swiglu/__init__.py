"""Gate, up and SwiGLU of contiguous groups of rows; see api.py."""
