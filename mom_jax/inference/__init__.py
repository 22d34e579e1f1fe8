"""Generation: prefill, decoding, sampling."""
