"""Reading and writing of checkpoints in flash-linear-attention's formats."""

from mom_jax.hf.files import load, save
from mom_jax.hf.settings import config_from_hf, config_to_hf
from mom_jax.hf.tensors import from_state_dict, mom_params, to_state_dict

__all__ = [
    'config_from_hf', 'config_to_hf', 'from_state_dict', 'load', 'mom_params',
    'save', 'to_state_dict',
]
