"""Generation: prefill, decoding, sampling."""

__all__ = ['decode', 'sampling']
