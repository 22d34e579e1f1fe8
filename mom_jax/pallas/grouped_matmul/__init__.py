"""Matrix products of contiguous groups of rows; see api.py."""
