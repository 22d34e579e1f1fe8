"""Both papers in one model: MoM mixes tokens, MoMa mixes channels.

Source: ours; there is no publication of the combination. Width, depth, data and
schedule of moma_1b4 (arXiv 2407.21770), memories of mom_1b3 (arXiv 2502.13685)
with softmax attention in every eighth layer. Norms are before the mixers, as
MoM was trained: behind MoMa a norm would hide the weight of a token's only
expert from the router. Tokens choose their expert, so that training is causal;
memories and experts are balanced by loss and by bias.

Data: captioned images as 1024 codes (32 x 32 patches) of 8192, and text; a text
tokenizer of up to 57,340 tokens fits the joint vocabulary of 65,536. The
paper's image tokenizer is not public; patch_vq replaces it until
--config.data.tokenizer.image names a better one.

  python -m mom_jax.train --config=configs/mom_moma_1b4.py \\
    --workdir=runs/mom_moma_1b4 \\
    --config.data.sources=array_record:pairs.array_record,jsonl:text.jsonl

Expected: unknown. Compare with moma_1b4:causal and with
--config.model.pattern=mom/mlp.

Time: not measured.
"""

from mom_jax import config


def get_config():
  c = config.to_config_dict(config.Config())
  c.model.vocab_size = 65536
  c.model.image_side = 0
  c.model.width = 2048
  c.model.num_layers = 24
  c.model.pattern = ' '.join(7 * ['mom/moma'] + ['attention/moma'])
  c.model.tie_embeddings = False
  c.model.dtype = 'bfloat16'
  c.model.remat = 'dots'
  c.model.mixer.num_heads = 4
  c.model.mixer.chunk = 64
  c.model.mixer.key_dim = 256
  c.model.mixer.value_dim = 256
  c.model.attention.num_heads = 16
  c.model.attention.num_kv_heads = 16
  c.model.attention.head_dim = 128
  c.model.attention.qk_norm = True
  c.model.mlp.hidden = 5461
  c.model.moma.experts = (4, 4)
  c.model.moma.hidden = 5461
  c.model.moma.router = 'token_choice'
  c.model.moma.top_k = 1
  c.loss.balance = 1e-2
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
