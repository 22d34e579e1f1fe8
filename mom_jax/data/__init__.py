"""Documents to batches: sources, tokenizers, packing, the default data set.

  Document(parts, key) -> tokens -> pieces of at most T -> sequences -> Batch
"""

from mom_jax.data.batch import Batch

__all__ = [
    'Batch', 'encode', 'files', 'pipeline', 'sharded_iterator', 'synthetic',
    'tokenizers', 'unigram']
