"""Layers on a mesh: result and gradients are those of one device.

Memories and experts on their ranks, heads and hidden width in parts,
sequences split along time. Documents of odd lengths, padding between tokens,
and routers that send far more to some than to others.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config
from mom_jax.models import block, layers
from mom_jax.parallel import sharding
from mom_jax.planning import hlo, traffic

B, T, D = 4, 16, 8
MOM = block.MIXERS['mom'].make
# The reference backend compiles fast; what is sharded is around it.
MIXER = dict(num_heads=2, key_dim=4, value_dim=4, chunk=2, num_memories=3,
             top_k=2, backend='reference')
EVERY = dict(expert=2, tensor=2, context=2)
SLICES = dict(dcn_expert=2, expert=2)


def _mom(**mixer):
  return dataclasses.replace(
      config.Config().model, width=D, mixer=config.Mixer(**(MIXER | mixer)))


def _moma(**settings):
  settings = dict(experts=(2, 2), hidden=4) | settings
  return dataclasses.replace(
      config.Config().model, width=D, moma=config.Moma(**settings))


def _inputs():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, T, D)).astype(np.float32)
  segment = np.sort(rng.integers(1, 5, (B, T)), 1).astype(np.int32)
  segment[0] = 1  # a document on all devices
  segment[1, 3:11] = 0  # and a part with hardly a token
  segment[2, rng.random(T) < 0.3] = 0
  modality = np.where(segment > 0, rng.integers(0, 2, (B, T)), -1)
  return x, segment, modality.astype(np.int32)


def _run(cfg, name, method, variables, x, segment, modality):
  """`init` or `apply` of a token or channel mixer, as a block calls it."""
  sublayer = (block.MIXERS | block.CHANNELS)[name]
  tokens = layers.TokenInfo(modality, segment, None)
  return getattr(sublayer.make(cfg), method)(
      variables, x, method=lambda layer, x: sublayer.call(
          layer, x, None, tokens, None))


def _apply(cfg, name, params, *inputs):
  y, _, aux = _run(
      cfg, name, 'apply', {'params': params}, *map(jnp.asarray, inputs))
  return y, aux


def _boxed(cfg, name):
  with layers.with_logical_axes():
    inputs = [jnp.asarray(a) for a in _inputs()]
    return jax.jit(lambda key: _run(cfg, name, 'init', key, *inputs)['params'])(
        jax.random.key(0))


@functools.cache
def _params(cfg, name):
  rng = np.random.default_rng(1)
  # Large enough for outputs of order 1, and a router that is not even.
  draw = lambda path, p: np.asarray(p) if path[-1].key in (
      'threshold', 'balance_bias', 'dt_bias', 'A_log', 'w0'
  ) else np.asarray(p) + rng.normal(size=p.shape, scale=0.3).astype(p.dtype)
  params = jax.tree_util.tree_map_with_path(
      draw, nn.meta.unbox(_boxed(cfg, name)))
  if name == 'mom' and 'balance_bias' in params:  # all to one
    params['balance_bias'] = np.array([0, 0, 9, 0], np.float32)
  return params


@functools.cache
def _gradient(cfg, name, sizes):
  params, sizes = _params(cfg, name), dict(sizes)
  x, segment, modality = _inputs()

  def loss(params, x):
    y, aux = _apply(cfg, name, params, x, segment, modality)
    return jnp.sin(y).sum(), (y, aux.stats and aux.stats.selected_BTE)

  return _on(sizes, jax.value_and_grad(loss, (0, 1), has_aux=True), params, x)


def _on(sizes, fn, *args):
  mesh = sharding.make_mesh(
      **({'data': 1} | sizes),
      devices=jax.devices()[:int(np.prod([*sizes.values()], dtype=int))])
  with jax.set_mesh(mesh):
    return jax.device_get(jax.jit(fn)(*args))


def _equal(cfg, name, **sizes):
  ((_, (y, took)), grads) = _gradient(cfg, name, tuple(sizes.items()))
  ((_, (want, want_took)), want_grads) = _gradient(cfg, name, ())
  if took is not None:
    np.testing.assert_array_equal(took, want_took)
    assert took.any()
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(y, want, atol=1e-5)

  def close(path, a, b):
    np.testing.assert_allclose(
        a, b, atol=1e-5 * max(1, np.abs(b).max()),
        err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(close, grads, want_grads)


slow_law = pytest.mark.slow_law


@pytest.mark.parametrize('sizes', [
    EVERY,
    SLICES,
    pytest.param(dict(expert=4), marks=slow_law),
    pytest.param(dict(dcn_expert=4), marks=slow_law),
    pytest.param(SLICES | dict(context=2), marks=slow_law),
    pytest.param(dict(dcn_data=2, dcn_expert=2), marks=slow_law),
    pytest.param(dict(tensor=2), marks=slow_law),
    pytest.param(dict(context=4), marks=slow_law),
    pytest.param(dict(context=8), marks=slow_law),
    pytest.param(dict(data=2, context=3), marks=slow_law),
], ids=str)
def test_memories_on_a_mesh(sizes):
  cfg = _mom()
  if sizes.get('context') == 3:
    with pytest.raises(ValueError, match='config.data.seq_len'):
      _gradient(cfg, 'mom', tuple(sizes.items()))
    return
  _equal(cfg, 'mom', **sizes)


LAYERS = {
    'uneven_placement': (_mom(num_memories=2), dict(expert=2)),
    'one_memory_and_shared': (
        _mom(num_memories=1, top_k=1), dict(expert=2)),
    'only_one': (
        _mom(num_memories=1, top_k=1, shared=False), dict(expert=2)),
    'all_to_one_memory': (
        _mom(num_memories=4, top_k=1, router='softmax_topk_bias'),
        dict(expert=4)),
    'all_to_one_memory_of_slices': (
        _mom(num_memories=4, top_k=1, router='softmax_topk_bias'), SLICES),
    'uneven_slices': (_mom(num_memories=2), SLICES),
    'only_one_in_slices': (
        _mom(num_memories=1, top_k=1, shared=False), SLICES),
    'single_kv': (_mom(single_kv_proj=True), EVERY),
    'additive': (_mom(rule='gla'), EVERY),
    'no_decay': (_mom(rule='linear', feature_map='elu', normaliser=True),
                 dict(context=4)),
    'slots': (_mom(rule='gsa'), dict(context=4)),
    'erases_by_channel': (_mom(rule='gated_delta_2'), dict(context=4)),
    'many_writes': (
        _mom(rule='gated_delta_product', num_householder=2), dict(context=4)),
    'first_values': (_mom(rule='rwkv7', conv_width=0), EVERY),
    'reads_before': (_mom(rule='rwkv6', conv_width=0), dict(context=4)),
    'rotary': (_mom(rule='retention'), dict(context=4)),
    'lower_bounds': (_mom(rule='hgrn2'), dict(tensor=2)),
    'one_key': (
        _mom(rule='mamba2', num_heads=4, key_heads=2, conv_bias=True),
        dict(tensor=2)),
    'gradient_steps': (_mom(rule='titans'), dict(context=4)),
    'nonlinear': (_mom(rule='ttt_linear'), dict(context=2, expert=2)),
    'modality_specific': (
        dataclasses.replace(_mom(), modality_specific=True), EVERY),
}


@slow_law
@pytest.mark.parametrize('name', LAYERS)
def test_every_kind_of_memory_on_a_mesh(name):
  cfg, sizes = LAYERS[name]
  _equal(cfg, 'mom', **sizes)


EXPERTS = {
    'token_choice': (_moma(router='token_choice'), dict(
        expert=2, tensor=2)),
    'equal_room': (
        _moma(experts=(4,), router='expert_choice'), dict(expert=4)),
    'token_choice_of_slices': (_moma(router='token_choice'), SLICES),
    'equal_room_of_slices': (
        _moma(experts=(4,), router='expert_choice'), SLICES),
    'six_over_slices': (
        _moma(experts=(6,), router='expert_choice'), SLICES),
    'three_over_slices': (
        _moma(experts=(1, 2), router='token_choice'), SLICES),
    'every_axis_of_slices': (
        _moma(router='expert_choice'), SLICES | dict(tensor=2)),
    'three_over_two': (
        _moma(experts=(3,), router='expert_choice'), dict(expert=2)),
    'one_each': (_moma(experts=(1, 1)), EVERY),
    'only_one': (_moma(experts=(1,)), EVERY),
    'top_2': (_moma(router='token_choice', top_k=2), EVERY),
    'expert_choice': (_moma(router='expert_choice'), EVERY),
    'threshold': (_moma(router='threshold'), EVERY),
    'global': (_moma(router='expert_choice', pool='global'), EVERY),
    'shared': (_moma(router='token_choice', shared=1), EVERY),
}


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if i < 4 else slow_law)
    for i, name in enumerate(EXPERTS)])
def test_experts_on_a_mesh(name):
  cfg, sizes = EXPERTS[name]
  _equal(cfg, 'moma', **sizes)


@pytest.mark.parametrize('name', ['mom', 'moma'])
def test_gradients_of_memories_and_experts_are_scattered(name):
  """Whole sums are of what is small: norms, convolutions, routers. Of dense
  products they are the compiler's affair.
  """
  cfg = {'mom': _mom(), 'moma': _moma(router='token_choice')}[name]
  mesh = sharding.make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    boxed = jax.eval_shape(lambda: _boxed(cfg, name))
    places = sharding.param_shardings(boxed, mesh, 'fsdp')
    given = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        nn.meta.unbox(boxed), places)
    inputs = jax.device_put(_inputs(), sharding.batch_sharding(mesh))
    loss = lambda params, *inputs: jnp.sin(
        _apply(cfg, name, params, *inputs)[0]).sum()
    text = jax.jit(jax.grad(loss), out_shardings=places).lower(
        given, *inputs).compile().as_text()
  sums = {'all-reduce': [], 'reduce-scatter': []}
  for computation in hlo.parse(text).computations.values():
    for i in computation.instructions:
      if i.op in sums and len(traffic.replica_group(i, 4)) > 1:
        sums[i.op] += [a.size for a in i.shape]
  smallest = D * 16  # of memories or experts
  assert max(sums['all-reduce']) < smallest <= 4 * max(sums['reduce-scatter'])


@pytest.mark.slow
def test_a_million_tokens():
  """One document over eight devices; what they read is what one device reads.
  """
  # Of two memories a token: the weight of an only one is 1, and what is left of
  # the router's gradient is rounding.
  cfg = _mom(num_heads=1, num_memories=3, top_k=2, chunk=64, backend='xla')
  T = 2**20
  x = np.random.default_rng(2).normal(size=(1, T, D)).astype(np.float32)
  params = _params(cfg, 'mom')

  def loss(params, x):
    y, _, _ = MOM(cfg).apply(
        {'params': params}, x, None, jnp.ones((1, T), jnp.int32))
    return jnp.sin(y).mean(), y

  got, want = (
      _on(dict(context=n), jax.value_and_grad(loss, has_aux=True), params, x)
      for n in (8, 1))
  np.testing.assert_allclose(got[0][1], want[0][1], atol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, atol=1e-4 * np.abs(b).max()), got[1], want[1])


@slow_law
def test_attention_on_a_mesh():
  cfg = dataclasses.replace(config.Config().model, width=D, attention=(
      config.Attention(num_heads=2, num_kv_heads=2, head_dim=4)))
  _equal(cfg, 'attention', tensor=2, context=2, data=2)


def test_heads_that_a_mesh_cannot_split_are_named():
  mesh = sharding.make_mesh(data=1, tensor=4, devices=jax.devices()[:4])
  with jax.set_mesh(mesh), pytest.raises(
      ValueError, match='config.model.mixer.num_heads=2 cannot be split over'
      ' config.mesh.tensor=4'):
    jax.eval_shape(
        lambda x, s: MOM(_mom()).init(jax.random.key(0), x, None, s),
        jnp.zeros((B, T, D)), jnp.ones((B, T), jnp.int32))
