"""MoM + MoMa on captioned emoji and the King James Bible, on a laptop.

The defaults of `mom_jax.config.Config`: four blocks of Mixture-of-Memories and
modality-aware experts, trained with causal routers from the start, on the data
that the extra `demo` brings.

  python -m mom_jax.train --config=configs/quickstart.py --workdir=runs/demo
"""

from mom_jax import config


def get_config():
  return config.to_config_dict(config.Config())
