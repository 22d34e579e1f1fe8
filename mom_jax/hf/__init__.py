"""Reading and writing of checkpoints in flash-linear-attention's formats."""

from mom_jax.hf.files import copy_tokenizer, load, read_config, save
from mom_jax.hf.tensors import from_state_dict, mom_params, to_state_dict

__all__ = [
    'copy_tokenizer', 'from_state_dict', 'load', 'mom_params', 'read_config',
    'save', 'to_state_dict',
]
