"""The layers equal their definitions, in outputs and in gradients."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, routing
from mom_jax.models import moma, reference

B, T, D, F = 3, 12, 8, 6

# Every router, every arrangement of experts, and what only some depend on.
MOMA = {
    router: dict(router=router, experts=(4, 4), top_k=2)
    for router in sorted(routing.ROUTERS)
} | {
    f'{router}-{"+".join(map(str, experts))}': dict(
        router=router, experts=experts)
    for router in ('expert_choice', 'threshold', 'token_choice')
    for experts in ((6, 2), (8,), (1, 1))
} | {
    'softmax_topk-6+2': dict(router='softmax_topk', experts=(6, 2), top_k=2),
    'device': dict(router='expert_choice', experts=(4, 4), pool='device'),
    'global': dict(router='expert_choice', experts=(4, 4), pool='global'),
    'device-8': dict(router='expert_choice', experts=(8,), pool='device'),
    'few_tokens': dict(router='expert_choice', experts=(4, 4), capacity=0.3),
    'many_tokens': dict(router='expert_choice', experts=(6, 2), capacity=1.5),
    'three_modalities': dict(router='expert_choice', experts=(2, 3, 1)),
    'shared': dict(router='expert_choice', experts=(6, 2), shared=2),
    'shared-1': dict(router='token_choice', experts=(1,), shared=1),
}


def _inputs(modalities=2, padding=0.2, seed=1):
  rng = np.random.default_rng(seed)
  modality = rng.integers(0, modalities, (B, T))
  modality[rng.random((B, T)) < padding] = -1
  x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
  return x, jnp.asarray(modality)


def _moma(experts, shared=0, **settings):
  """The layer, and parameters large enough for outputs of order 1."""
  part = config.Moma(experts=experts, hidden=F, shared=shared, **settings)
  cfg = dataclasses.replace(config.Config().model, width=D, moma=part)
  layer = moma.Moma(cfg)
  shapes = nn.meta.unbox(jax.eval_shape(
      layer.init, jax.random.key(0), *_inputs()))['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), shapes)
  state = routing.get(settings['router']).state
  if state and state.name in params:  # each its own, so that it matters
    params[state.name] = jnp.linspace(0.1, 0.7, sum(experts))
  return layer, params


@pytest.mark.parametrize('settings', MOMA.values(), ids=MOMA)
def test_moma_is_its_definition(settings):
  layer, params = _moma(**settings)
  x, modality = _inputs(max(2, len(settings['experts'])))
  weight = jax.random.normal(jax.random.key(3), x.shape)
  fields = {k: v for k, v in settings.items() if k != 'shared'}
  state = getattr(routing.get(settings['router']).state, 'name', None)

  def definition(params, x):
    return reference.moma_ref(
        params, x, modality, **fields, state_E=params.get(state))

  def mine(params, x):
    y, aux = layer.apply({'params': params}, x, modality)
    return y, aux.stats.selected_BTE

  def run(f):
    def loss(params, x):
      y, selected = f(params, x)
      return (y * weight).sum() + (y**2).sum(), (y, selected)
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

  (_, (y, selected)), grads = run(mine)
  (_, (want, want_selected)), want_grads = run(definition)
  np.testing.assert_array_equal(selected, want_selected)
  np.testing.assert_allclose(y, want, atol=1e-5, rtol=1e-5)
  assert np.abs(want).max() > 0.1
  np.testing.assert_array_equal(y[modality < 0], 0)
  for path, g in jax.tree_util.tree_leaves_with_path(grads[0]):
    fixed = path[0].key in (state, 'auxiliary')  # those of the second stage
    assert np.abs(g).max() > 1e-3 or fixed, path
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-4),
      grads, want_grads)


def test_moma_ref_takes_the_first_of_equals():
  """As the layer does: equal tokens, equal scores."""
  layer, params = _moma((4, 4), router='expert_choice')
  x, modality = _inputs(padding=0)
  x = jnp.broadcast_to(x[:, :1], x.shape)
  _, selected = jax.jit(lambda x: reference.moma_ref(
      params, x, modality, experts=(4, 4), router='expert_choice'))(x)
  _, aux = jax.jit(layer.apply)({'params': params}, x, modality)
  np.testing.assert_array_equal(selected, aux.stats.selected_BTE)
  assert selected.any()
