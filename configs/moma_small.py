"""MoMa and what it is compared with, at a size that trains in minutes.

`--config=configs/moma_small.py:NAME` chooses the model. All are of the same
size to a token: the same attention, and one FFN's worth of experts.

  dense         an MLP in place of experts
  moe_1t1i      one expert a modality, nothing to route
  moe_8x        eight experts that both modalities share, which choose tokens
  moe_4t4i      four text and four image experts, which choose tokens; default
  threshold     the same eight, tokens above an expert's threshold go to it
  token_choice  the same eight, every token chooses one
  upcycled      moe_4t4i with noise, for a run that continues a moe_1t1i
  mot           moe_1t1i with modality-specific attention and norms:
                Mixture-of-Transformers (arXiv 2411.04996)
  mom           token_choice with memories in place of attention, and norms
                before layers: no rival of these, but what wrong memories cost

The learning rate is constant, and validation is of averaged parameters: every
point of a curve is a run that could have ended there.

Source: norms, QK-norm, pool and noise as in arXiv 2407.21770; all sizes ours.

Expected: docs/results/moma.md.

Time: minutes on one CPU core; not measured, others used the machine.

  python -m mom_jax.train --config=configs/moma_small.py:moe_4t4i \\
    --workdir=runs/moma_small/moe_4t4i
"""

from mom_jax import config

EXPERTS = {'moe_1t1i': (1, 1), 'moe_8x': (8,), 'moe_4t4i': (4, 4),
           'threshold': (4, 4), 'token_choice': (4, 4), 'upcycled': (4, 4),
           'mot': (1, 1), 'mom': (4, 4)}
NAMES = ('dense', *EXPERTS)


def get_config(name='moe_4t4i'):
  if name not in NAMES:
    raise config.UserError(
        f'model {name!r} is unknown; known: {", ".join(NAMES)}.'
    )
  c = config.to_config_dict(config.Config())
  c.model.width = 48
  c.model.num_layers = 3
  c.model.pattern = 'attention/mlp' if name == 'dense' else 'attention/moma'
  if name == 'mom':
    c.model.pattern = 'mom/moma'
  c.model.modality_specific = name == 'mot'
  c.model.mixer_norm = c.model.channel_norm = 'pre' if name == 'mom' else 'post'
  c.model.remat = 'none'
  c.model.attention.num_heads = 3
  c.model.attention.num_kv_heads = 3
  c.model.attention.head_dim = 16
  c.model.mlp.hidden = 192
  c.model.moma.hidden = 192
  c.model.moma.experts = EXPERTS.get(name, (4, 4))
  c.model.moma.router = {
      'threshold': 'threshold', 'token_choice': 'token_choice',
      'mom': 'token_choice',
  }.get(name, 'expert_choice')
  c.model.moma.pool = 'device'
  c.model.moma.noise = name == 'upcycled'
  c.data.weights = (1.0, 2.0)  # pictures would repeat too often
  c.data.seq_len = 256
  c.data.batch_size = 4
  c.optimizer.learning_rate = 3e-3
  c.optimizer.schedule = 'constant'
  c.optimizer.warmup_steps = 40
  c.optimizer.ema = 0.99
  c.optimizer.weight_decay = 0.1
  c.train.steps = 1600
  c.train.log_every = 20
  c.train.eval_every = 100
  c.train.eval_batches = 12
  c.train.writers = ('jsonl',)
  c.checkpoint.every = 400
  c.checkpoint.keep = 1
  return c
