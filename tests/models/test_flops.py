"""Operations counted by formula against parameters and against XLA."""

import jax
import jax.numpy as jnp
import pytest

from mom_jax import config
from mom_jax.models import (
    LM,
    eval_modes,
    flops,
    init_cache,
    init_params,
)

TINY = (
    'model.width=16', 'model.num_layers=2', 'model.vocab_size=64',
    'model.image_side=0',
    'model.mixer.num_heads=2', 'model.mixer.key_dim=8',
    'model.mixer.value_dim=4', 'model.attention.head_dim=8',
    'model.mlp.hidden=24', 'model.moma.hidden=24',
)


def _cfg(*overrides):
  return config.override(config.Config(), TINY + overrides)


@pytest.mark.parametrize('pattern', ['mom/moma', 'attention/mlp', 'mom/mlp'])
@pytest.mark.parametrize(
    'more', [(), ('model.mixer.single_kv_proj=True',),
             ('model.mixer.num_memories=1', 'model.mixer.top_k=1',
              'model.moma.experts=1,1'),
             ('model.moma.router=expert_choice', 'model.moma.capacity=2.0'),
             ('model.moma.experts=8', 'model.moma.shared=1')])
def test_every_matrix_is_used_twice_per_weight_and_token(pattern, more):
  """Without states and scores, 2 operations a weight that a token meets.

  Norm scales, constants and convolutions are no matrices; the untied input
  embedding is looked up.
  """
  cfg = _cfg(f'model.pattern={pattern}', 'model.tie_embeddings=False',
             'data.seq_len=1', *more)
  model, mixer = cfg.model, cfg.model.mixer
  no_matrix = model.vocab_size * model.width + model.width
  no_matrix += 2 * model.num_layers * model.width
  rest = 0
  if pattern.startswith('mom'):
    H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
    convs = mixer.conv_width * H * (2 * K + V)
    no_matrix += model.num_layers * (convs + 2 * H + V)
    rows = mixer.top_k + 1
    rest = model.num_layers * rows * H * 3 * 2 * K * V
  else:
    attention = model.attention
    no_matrix += model.num_layers * 2 * attention.head_dim
    rest = model.num_layers * 4 * attention.num_heads * attention.head_dim
  _, activated = flops.count_params(cfg)
  want = 2 * (activated - no_matrix) + rest
  assert flops.forward_flops_per_token(cfg) == pytest.approx(want, rel=1e-9)
  assert flops.train_flops_per_token(cfg) == pytest.approx(3 * want, rel=1e-9)


@pytest.mark.parametrize(('window', 'seen'), [(0, 4.5), (1, 1), (3, 21 / 8)])
def test_attention_counts_the_tokens_seen(window, seen):
  """Row of 8: 1 + 2 + ... + 8, or at most `window` each."""
  cfg = _cfg('model.pattern=attention/mlp', 'data.seq_len=8',
             f'model.attention.window={window}')
  one = _cfg('model.pattern=attention/mlp', 'data.seq_len=1')
  got = flops.forward_flops_per_token(cfg) - flops.forward_flops_per_token(one)
  per_slot = 2 * 4 * 4 * 8  # layers, products, heads, head_dim
  assert got == pytest.approx(per_slot * (seen - 1))


def test_auxiliary_routers_count_where_they_route():
  """D x D/2 of the token's modality and D/2 x E, two operations each."""
  cfg = _cfg('model.pattern=attention/moma', 'model.moma.experts=3,2',
             'model.moma.router=expert_choice')
  second = eval_modes.aux_causal(cfg)
  more = 2 * cfg.model.num_layers * (16 * 8 + 8 * 5)
  got = flops.forward_flops_per_token(second) - flops.forward_flops_per_token(
      cfg)
  assert got == more
  activated = flops.count_params(second)[1] - flops.count_params(cfg)[1]
  assert 2 * activated == more


def test_depth_works_on_its_share_of_the_tokens():
  """A quarter of a row of 8 through every second block, and its router."""
  row = 'data.seq_len=8'
  plain = _cfg('model.pattern=attention/mlp', row)
  quarter = _cfg('model.pattern=attention/mlp', 'data.seq_len=2')
  with_mod = _cfg('model.pattern=mod/attention/mlp attention/mlp', row)
  whole, part, got = map(
      flops.forward_flops_per_token, (plain, quarter, with_mod))
  ends = 2 * 16 * 64
  one, few = (whole - ends) / 2, (part - ends) / 2
  assert got == pytest.approx(ends + one + few / 4 + 2 * 16)
  block = flops.count_params(plain)[1] - flops.count_params(
      _cfg('model.pattern=attention/mlp', 'model.num_layers=1'))[1]
  assert flops.count_params(plain)[1] - flops.count_params(with_mod)[1] == (
      3 * block / 4 - 16)


def test_equals_what_xla_counts():
  """One wide layer, decoding into a cache of one slot: nearly all matmuls."""
  cfg = _cfg('model.pattern=attention/mlp', 'model.num_layers=1',
             'model.width=256', 'model.mlp.hidden=512', 'data.seq_len=1')
  params = jax.eval_shape(lambda k: init_params(cfg, k), jax.random.key(0))
  cache = init_cache(cfg, 4, 1)
  run = lambda p, t, c: LM(cfg).apply({'params': p}, t, cache=c).logits
  compiled = jax.jit(run).lower(
      params, jnp.zeros((4, 1), jnp.int32), cache).compile()
  counted = compiled.cost_analysis()['flops'] / 4
  assert counted == pytest.approx(flops.forward_flops_per_token(cfg), rel=0.02)
