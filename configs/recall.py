"""Memories on synthetic tasks, beside rivals of the same size to a token.

`--config=configs/recall.py:task=TASK,mixer=ARM` chooses what is learnt, a task
of mom_jax/data/synthetic.py at the loads of LOADS, mixed in equal parts of
tokens, and by what, two blocks of width 64:

  mom        MoM: four memories, two of them to a token, and a shared one
  single_kv  the same, its memories with one set of key, value and gate maps
  plain      gated delta, one memory: MoM's shared memory alone
  expanded   one memory whose values are five times as wide: as large a state
             as all of MoM's
  keys       the same state by keys five times as wide, each head
  shared     MoM without choice: three memories that every token is written to
  attention  softmax attention
  hybrid     MoM, then attention

The hidden width of the MLPs makes up for what a token mixer has less, so that
all use the same number of parameters to a token, to a thousandth or two. Other
arguments: memories=8 and top_k=4 of `mom`, so that K/M stays. The task `text`
is the King James Bible, in tokens of a BPE.

Source: tasks as in arXiv 2312.04927 (mqar) and as synthetic.py says; arms as
in arXiv 2502.13685, section 4; all sizes ours.

Expected: docs/results/memory.md.

Time: a minute of one CPU core, two for MoM.

  python -m mom_jax.train --config=configs/recall.py:task=mqar,mixer=mom \\
    --workdir=runs/recall/mqar-mom
  python -m mom_jax.evaluate --workdir=runs/recall/mqar-mom --task=mqar
"""

from mom_jax import config

# What a task is trained at: the sources' specs, and the symbols it takes.
LOADS = {
    'mqar': ([f'pairs={n}' for n in (2, 4, 8)], 32),
    'needle': ([f'needles={n}:values=1:length=32' for n in (1, 2, 4)], 32),
    'phonebook': ([f'entries={n}:digits=2' for n in (2, 4, 7)], 32),
    'selective_copy': ([f'items={n}:length=32' for n in (2, 4, 8)], 16),
    'state_tracking': ([f'length={n}' for n in (2, 4, 8, 16)], 8),
}
# Of each arm: settings of the token mixer, and what matches its size.
ONE = dict(num_memories=1, top_k=1, shared=False)
ARMS = {
    'mom': ({}, 128),
    'single_kv': (dict(single_kv_proj=True), 141),
    'plain': (ONE, 143),
    'expanded': (ONE | dict(value_dim=20), 110),
    'keys': (ONE | dict(key_dim=20), 120),
    'shared': (dict(num_memories=2), 129),
    'attention': ({}, 115),
    'hybrid': ({}, 122),
}
PATTERNS = {'attention': 'attention/mlp', 'hybrid': 'mom/mlp attention/mlp'}
TEXT = 'text'


def get_config(task='mqar', mixer='mom', memories=4, top_k=2):
  if task not in (*LOADS, TEXT):
    raise config.UserError(
        f'task {task!r} is unknown; known: {", ".join([*LOADS, TEXT])}.')
  if mixer not in ARMS:
    raise config.UserError(
        f'mixer {mixer!r} is unknown; known: {", ".join(ARMS)}.')
  loads, symbols = LOADS.get(task, ((), 512))
  settings, hidden = ARMS[mixer]
  c = config.to_config_dict(config.Config())
  c.model.vocab_size = symbols + 4
  c.model.width = 64
  c.model.num_layers = 2
  c.model.pattern = PATTERNS.get(mixer, 'mom/mlp')
  c.model.modalities = ('text',)
  c.model.image_side = 0
  c.model.remat = 'none'
  c.model.mlp.hidden = hidden
  c.model.attention.num_heads = 2
  c.model.attention.num_kv_heads = 2
  c.model.attention.head_dim = 16
  c.model.mixer.num_heads = 2
  c.model.mixer.key_dim = 4
  c.model.mixer.value_dim = 4
  c.model.mixer.chunk = 16
  c.model.mixer.num_memories = memories
  c.model.mixer.top_k = top_k
  c.model.mixer.update(settings)
  c.data.sources = tuple(
      f'synthetic:{task}:{load}' for load in loads) or ('kjv',)
  c.data.weights = (1.0,) * len(c.data.sources)
  c.data.tokenizer.text = f'symbols:{symbols}' if loads else f'bpe:{symbols}'
  c.data.seq_len = 264 if loads else 128
  c.data.batch_size = 4 if loads else 16
  c.loss.balance = 1e-2
  c.loss.modality_weights = (1.0,)
  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 40
  c.train.steps = 1500
  c.train.log_every = 50
  c.train.eval_every = 500
  c.train.eval_batches = 8
  c.train.writers = ('jsonl',)
  c.checkpoint.every = 1500
  c.checkpoint.keep = 1
  return c
