"""Mixture-of-Memories and modality-aware experts in JAX.

Dimension key, used as suffixes of array names throughout:

  B batch           T time             D width            H heads
  K key size        V value size       M memories         E experts
  G groups (of rows: a memory or an expert, per sample where it matters)
  A choices per token                  R routed rows      C chunk length
  N chunks          F hidden width     L layers           W vocabulary
  P image patches   O ranks that own groups, and Q rows that they receive

Capitals are logical sizes; a lower-case letter is a device's local shard.
"""

__version__ = '0.2.0'
