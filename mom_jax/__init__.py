"""Mixture-of-Memories and modality-aware experts in JAX.

Dimension key, used as suffixes of array names throughout:

  B batch            T time            N tokens, B T; in chunk_memory, chunks
  D width            F hidden width; in convolutions, columns
  H heads            U heads with queries and keys of their own
  K key size         V value size      n updates per token
  M memories         E experts         S modalities
  G groups: memories or experts, per sample where it matters
  A choices per token                  R routed rows
  P positions of a layout; in expert choice, pools of tokens
  O ranks           Q rows that ranks receive; in chunk_memory, queues
  C chunk length     L layers          X any other size
  W vocabulary; in convolutions, taps, and one fewer in `window_*`

Capitals are logical sizes; a lower-case letter is a device's local part.
"""

__version__ = '0.2.0'
