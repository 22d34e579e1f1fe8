"""MoMa 4t4i of the 90M class: four text and four image experts a layer.

Source: arXiv 2407.21770, tables 1 and 5; norms, QK-norm, z-loss and the rest of
the optimizer from Chameleon (arXiv 2405.09818), which MoMa builds on. 209.7M
parameters.

Data: captioned images as 1024 codes (32 x 32 patches) of 8192, and text; a text
tokenizer of up to 57,340 tokens fits the joint vocabulary of 65,536. The
paper's image tokenizer is not public; patch_vq stands in until
--config.data.tokenizer.image names a better one.

  python -m mom_jax.train --config=configs/moma_90m.py \\
    --workdir=runs/moma_90m \\
    --config.data.sources=array_record:pairs.array_record,jsonl:text.jsonl

Experts choose tokens, as in the paper: training sees the future and its loss is
optimistic. `--config=configs/moma_90m.py:causal` lets tokens choose one expert
instead, causal in training as in use.

Expected, the paper's and not yet ours: a lower loss than the dense model of the
same FLOPs; only plots are published at this size.

Time: not published; not measured for ours.
"""

from mom_jax import config


def get_config(mode='expert_choice'):
  if mode not in ('expert_choice', 'causal'):
    raise config.UserError(
        f'mode {mode!r} is unknown; known: causal, expert_choice.'
    )
  c = config.to_config_dict(config.Config())
  c.model.vocab_size = 65536
  c.model.image_side = 0
  c.model.width = 512
  c.model.num_layers = 8
  c.model.pattern = 'attention/moma'
  c.model.mixer_norm = 'post'
  c.model.channel_norm = 'post'
  c.model.tie_embeddings = False
  c.model.dtype = 'bfloat16'
  c.model.remat = 'dots'
  c.model.attention.num_heads = 8
  c.model.attention.num_kv_heads = 8
  c.model.attention.head_dim = 64
  c.model.attention.qk_norm = True
  c.model.mlp.hidden = 1365
  c.model.moma.experts = (4, 4)
  c.model.moma.hidden = 1365
  c.model.moma.router = 'expert_choice' if mode != 'causal' else 'token_choice'
  c.model.moma.pool = 'device'
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
