"""The bridge to checkpoints published in flash-linear-attention's layouts."""

from mom_jax.hf.files import load, save
from mom_jax.hf.layouts import config_from_hf, config_to_hf
from mom_jax.hf.model import from_state_dict, mom_params, to_state_dict

__all__ = [
    'config_from_hf', 'config_to_hf', 'from_state_dict', 'load', 'mom_params',
    'save', 'to_state_dict',
]
