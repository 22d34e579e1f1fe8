"""The pure functions in plain jax: no Flax, no config, no mesh.

Each example trains or differentiates something small and is compared with the
same computation written out in jax.numpy.
"""

import doctest
import importlib

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import pallas, rules
from mom_jax.pallas import common

DOCUMENTED = (
    'mom_jax.pallas.chunk_fold', 'mom_jax.pallas.chunk_memory.api',
    'mom_jax.pallas.grouped_matmul.api', 'mom_jax.pallas.grouped_swiglu.api',
    'mom_jax.pallas.short_conv.api', 'mom_jax.rules.rule')


@pytest.mark.parametrize('name', DOCUMENTED)
def test_examples_of_docstrings_run(name):
  done = doctest.testmod(importlib.import_module(name))
  assert done.attempted and not done.failed


def _value_and_grads(fn, *args):
  """Sum of sines of a function, and its gradients in all arguments."""
  return jax.jit(jax.value_and_grad(
      lambda *args: jnp.sin(fn(*args)).sum(), tuple(range(len(args)))))(*args)


def _agree(got, want):
  contract.outputs_agree(got[0], want[0])
  jax.tree.map(contract.gradients_agree, got[1], want[1])


def test_chunk_memory_is_a_scan_over_tokens():
  """Gated delta rule on two sequences of 40 tokens, one head."""
  B, T, C, K, V = 2, 40, 16, 8, 12
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v = draw(B, T, K), draw(B, T, K) / K**0.5, draw(B, T, V)
  log_decay, beta = -jnp.exp(draw(B, T)), jax.nn.sigmoid(draw(B, T))

  def chunked(q, k, v, log_decay, beta):
    """Each sequence is a group, padded with zeros to whole chunks."""
    rows = -(-T // C) * C

    def lay_out(x):
      x = jnp.pad(x, [(0, 0), (0, rows - T)] + [(0, 0)] * (x.ndim - 2))
      return x.reshape(B * rows, 1, *x.shape[2:])

    o, _ = pallas.chunk_memory(
        *map(lay_out, (q, k, v, log_decay, beta)),
        group_N=jnp.repeat(jnp.arange(B), rows // C), num_groups=B, chunk=C)
    return o.reshape(B, rows, V)[:, :T]

  def by_token(q, k, v, log_decay, beta):
    def step(S_KV, row):
      q_K, k_K, v_V, g, b = row
      S_KV = jnp.exp(g) * S_KV
      S_KV += jnp.outer(k_K, b * (v_V - k_K @ S_KV))
      return S_KV, K**-0.5 * q_K @ S_KV

    def sequence(*rows):
      return jax.lax.scan(step, jnp.zeros((K, V)), rows)[1]

    return jax.vmap(sequence)(q, k, v, log_decay, beta)

  args = q, k, v, log_decay, beta
  _agree(_value_and_grads(chunked, *args), _value_and_grads(by_token, *args))


def test_grouped_matmul_is_a_product_for_each_group():
  """A mixture of experts: tokens sorted by expert, multiplied, put back."""
  N, D, F, E = 30, 8, 12, 4
  rng = np.random.default_rng(1)
  expert_N = jnp.asarray(rng.integers(0, E, N))
  x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(E, D, F)), jnp.float32)

  def grouped(x, w):
    order_N = jnp.argsort(expert_N)
    y = pallas.grouped_matmul(
        x, w, jnp.bincount(expert_N, length=E), row_index=order_N,
        inverse_index=pallas.inverse_permutation(order_N)[None])
    return y[pallas.inverse_permutation(order_N)]

  def dense(x, w):
    return jnp.einsum('nd,ndf->nf', x, w[expert_N], precision='highest')

  _agree(_value_and_grads(grouped, x, w), _value_and_grads(dense, x, w))


def test_a_rule_runs_without_a_layer():
  """gated_delta equals its recurrence; its constants learn by plain SGD."""
  T, H, K, V = 32, 2, 4, 6
  rule = rules.get('gated_delta')
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v = draw(T, H, K), draw(T, H, 1, K), draw(T, H, 1, V)
  gates = {'beta': draw(T, H, 1), 'decay': draw(T, H)}
  constants = {
      name: constant.init(
          jax.random.key(i), constant.shape(H, K, V), jnp.zeros(()))
      for i, (name, constant) in enumerate(rule.constants.items())}

  def chunked(q, k, v, gates, constants):
    o, _ = rules.run(
        rule, q, k, v, gates, constants, jnp.ones(T, bool),
        position_in_memory=jnp.arange(T), group_N=jnp.zeros(2, jnp.int32),
        segment_R=jnp.ones(T, jnp.int32), num_groups=1, chunk=T // 2)
    return o

  def by_token(q, k, v, gates, constants):
    unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)
    g_TH = -jnp.exp(constants['A_log'])[None] * jax.nn.softplus(
        gates['decay'] + constants['dt_bias'][None])

    def step(S_HKV, row):
      q_HK, k_HK, v_HV, g_H, b_H = row
      S_HKV = jnp.exp(g_H)[:, None, None] * S_HKV
      error_HV = v_HV - jnp.einsum('hk,hkv->hv', k_HK, S_HKV)
      S_HKV += jnp.einsum('hk,h,hv->hkv', k_HK, b_H, error_HV)
      return S_HKV, K**-0.5 * jnp.einsum('hk,hkv->hv', q_HK, S_HKV)

    rows = (unit(q), unit(k[:, :, 0]), v[:, :, 0], g_TH,
            jax.nn.sigmoid(gates['beta'][:, :, 0]))
    return jax.lax.scan(step, jnp.zeros((H, K, V)), rows)[1]

  args = q, k, v, gates, constants
  _agree(_value_and_grads(chunked, *args), _value_and_grads(by_token, *args))

  @jax.jit
  def step(constants):
    loss, grads = jax.value_and_grad(
        lambda c: (chunked(q, k, v, gates, c) ** 2).mean())(constants)
    return loss, jax.tree.map(lambda c, d: c - 0.1 * d, constants, grads)

  losses = []
  for _ in range(20):
    loss, constants = step(constants)
    losses.append(float(loss))
  assert losses[-1] < losses[0]


def test_inverse_permutations_by_scatter_and_by_sort():
  """TPUs sort."""
  order = jnp.asarray(np.random.default_rng(3).permutation(50), jnp.int32)
  want = np.argsort(order)
  np.testing.assert_array_equal(pallas.inverse_permutation(order), want)
  with common.interpret():
    np.testing.assert_array_equal(pallas.inverse_permutation(order), want)
