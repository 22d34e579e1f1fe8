"""Models of the 90M class: MoMa 4t4i and what the paper compares it with.

Source: arXiv 2407.21770, tables 1 and 5; norms, QK-norm, z-loss and the rest of
the optimizer from Chameleon (arXiv 2405.09818), which MoMa builds on.

`--config=configs/moma_90m.py:NAME` chooses the model; parameters without the
routers:

  dense           92.3M   an MLP in place of experts
  moe_1t1i       109.0M   one expert a modality, nothing to route
  moe_8x         209.7M   eight experts that both modalities share
  moe_4t4i       209.7M   four text and four image experts, the default
  causal         209.7M   the same, tokens choosing one expert each, norms
                          before the experts: causal in training as in use
  mod            111.1M   every other block works on a quarter of the tokens
  mod_moe_1t1i   140.5M
  mod_moe_4t4i   316.6M
  mot            117.4M   moe_1t1i with modality-specific attention and norms:
                          Mixture-of-Transformers (arXiv 2411.04996)

Data: captioned images as 1024 codes (32 x 32 patches) of 8192, and text; a text
tokenizer of up to 57,340 tokens fits the joint vocabulary of 65,536. The
paper's image tokenizer is not public; patch_vq replaces it until
--config.data.tokenizer.image names a better one.

  python -m mom_jax.train --config=configs/moma_90m.py \\
    --workdir=runs/moma_90m \\
    --config.data.sources=array_record:pairs.array_record,jsonl:text.jsonl

Experts choose tokens, as in the paper: training sees the future and its loss is
optimistic. Afterwards thresholds, kept in training, or the paper's auxiliary
routers, trained on sequences of 4096 tokens, make the model causal:

  python -m mom_jax.train --config=runs/moma_90m/config.json \\
    --workdir=runs/moma_90m_aux --config.train.stage=aux_router \\
    --config.train.init_from=runs/moma_90m \\
    --config.train.steps=5000 --config.optimizer.warmup_steps=1000 \\
    --config.data.batch_size=1024

Expected, the paper's and not yet ours: a lower loss than the dense model of the
same FLOPs; only plots are published at this size.

Time: not published; not measured for ours.
"""

from mom_jax import config

EXPERTS = {'moe_1t1i': (1, 1), 'moe_8x': (8,), 'moe_4t4i': (4, 4),
           'causal': (4, 4), 'mot': (1, 1)}
NAMES = ('dense', *EXPERTS, 'mod', 'mod_moe_1t1i', 'mod_moe_4t4i')


def get_config(name='moe_4t4i'):
  if name not in NAMES:
    raise config.UserError(
        f'model {name!r} is unknown; known: {", ".join(NAMES)}.'
    )
  experts = EXPERTS.get(name.removeprefix('mod_'))
  c = config.to_config_dict(config.Config())
  c.model.vocab_size = 65536
  c.model.image_side = 0
  c.model.width = 512
  c.model.num_layers = 8
  c.model.pattern = 'attention/moma' if experts else 'attention/mlp'
  c.model.modality_specific = name == 'mot'
  c.model.mixer_norm = 'post'
  # A norm behind the only expert of a token would hide its weight.
  c.model.channel_norm = 'pre' if name == 'causal' else 'post'
  c.model.tie_embeddings = False
  c.model.dtype = 'bfloat16'
  c.model.remat = 'dots'
  c.model.attention.num_heads = 8
  c.model.attention.num_kv_heads = 8
  c.model.attention.head_dim = 64
  c.model.attention.qk_norm = True
  c.model.mlp.hidden = 1365
  c.model.moma.experts = experts or (4, 4)
  c.model.moma.hidden = 1365
  c.model.moma.router = 'expert_choice' if name != 'causal' else 'token_choice'
  c.model.moma.pool = 'device'
  if name.startswith('mod'):
    c.model.pattern = f'mod/{c.model.pattern} {c.model.pattern}'
    c.model.num_layers = 14
  c.data.sources = ('array_record:data/pairs*.array_record',
                    'jsonl:data/text.jsonl')
  c.data.weights = (1.0, 1.0)
  c.data.tokenizer.text = 'data/tokenizer.json'
  c.data.tokenizer.image_size = 512
  c.data.tokenizer.patch = 16
  c.data.tokenizer.codes = 8192
  c.data.seq_len = 4096
  c.data.batch_size = 1536
  c.loss.z_loss = 1e-5
  c.optimizer.learning_rate = 1e-4
  c.optimizer.schedule = 'linear'
  c.optimizer.warmup_steps = 4000
  c.optimizer.end_ratio = 0.01
  c.optimizer.eps = 1e-5
  c.optimizer.weight_decay = 0.1
  c.optimizer.decay_embeddings = True
  c.train.steps = 160000
  c.train.log_every = 50
  c.train.eval_every = 2000
  c.train.eval_batches = 8
  c.checkpoint.every = 1000
  return c
