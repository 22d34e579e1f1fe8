"""Where arrays lie on many devices, and rows that travel between them."""
