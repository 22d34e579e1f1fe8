"""Models of the 1.4B class: MoMa 4t4i and what the paper compares it with.

Source: arXiv 2407.21770, tables 1 and 5; norms, QK-norm, z-loss and the rest of
the optimizer from Chameleon (arXiv 2405.09818), which MoMa builds on.

`--config=configs/moma_1b4.py:NAME` chooses the model; parameters without the
routers:

  dense           1476M   an MLP in place of experts
  moe_1t1i        2282M   one expert a modality, nothing to route
  moe_8x          7113M   eight experts that both modalities share
  moe_4t4i        7113M   four text and four image experts, the default
  causal          7113M   the same, tokens choosing one expert each, norms
                          before the experts: causal in training as in use
  mod             2340M   every other block works on a quarter of the tokens
  mod_moe_1t1i    3699M
  mod_moe_4t4i   11853M
  mot             2684M   moe_1t1i with modality-specific attention and norms:
                          Mixture-of-Transformers (arXiv 2411.04996)

Data: captioned images as 1024 codes (32 x 32 patches) of 8192, and text; a text
tokenizer of up to 57,340 tokens fits the joint vocabulary of 65,536. The
paper's image tokenizer is not public; patch_vq replaces it until
--config.data.tokenizer.image names a better one.

  python -m mom_jax.train --config=configs/moma_1b4.py \\
    --workdir=runs/moma_1b4 \\
    --config.data.sources=array_record:pairs.array_record,jsonl:text.jsonl

Experts choose tokens, as in the paper: training sees the future and its loss is
optimistic. Afterwards thresholds, kept in training, or the paper's auxiliary
routers, trained on sequences of 4096 tokens, make the model causal:

  python -m mom_jax.train --config=runs/moma_1b4/config.json \\
    --workdir=runs/moma_1b4_aux --config.train.stage=aux_router \\
    --config.train.init_from=runs/moma_1b4 \\
    --config.train.steps=10000 --config.optimizer.warmup_steps=2000 \\
    --config.data.batch_size=1024

Expected, the paper's and not yet ours: the loss of the dense 1.4B model with
1/3.7 of its training FLOPs (image 1/5.2, text 1/2.6).

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
  c.model.width = 2048
  c.model.num_layers = 24
  c.model.pattern = 'attention/moma' if experts else 'attention/mlp'
  c.model.modality_specific = name == 'mot'
  c.model.mixer_norm = 'post'
  # A norm behind the only expert of a token would hide its weight.
  c.model.channel_norm = 'pre' if name == 'causal' else 'post'
  c.model.tie_embeddings = False
  c.model.dtype = 'bfloat16'
  c.model.remat = 'dots'
  c.model.attention.num_heads = 16
  c.model.attention.num_kv_heads = 16
  c.model.attention.head_dim = 128
  c.model.attention.qk_norm = True
  c.model.mlp.hidden = 5461
  c.model.moma.experts = experts or (4, 4)
  c.model.moma.hidden = 5461
  c.model.moma.router = 'expert_choice' if name != 'causal' else 'token_choice'
  c.model.moma.pool = 'device'
  if name.startswith('mod'):
    c.model.pattern = f'mod/{c.model.pattern} {c.model.pattern}'
    c.model.num_layers = 32
    c.model.width = 2304
    c.model.attention.num_heads = 18
    c.model.attention.num_kv_heads = 18
    c.model.mlp.hidden = 6144
    c.model.moma.hidden = 6144
  c.data.sources = ('array_record:data/pairs*.array_record',
                    'jsonl:data/text.jsonl')
  c.data.weights = (1.0, 1.0)
  c.data.tokenizer.text = 'data/tokenizer.json'
  c.data.tokenizer.image_size = 512
  c.data.tokenizer.patch = 16
  c.data.tokenizer.codes = 8192
  c.data.seq_len = 4096
  c.data.batch_size = 2048
  c.loss.z_loss = 1e-5
  c.optimizer.learning_rate = 1e-4
  c.optimizer.schedule = 'linear'
  c.optimizer.warmup_steps = 4000
  c.optimizer.end_ratio = 0.01
  c.optimizer.eps = 1e-5
  c.optimizer.weight_decay = 0.1
  c.optimizer.decay_embeddings = True
  c.train.steps = 120000
  c.train.log_every = 50
  c.train.eval_every = 2000
  c.train.eval_batches = 8
  c.checkpoint.every = 1000
  c.mesh.fsdp = 64
  return c
