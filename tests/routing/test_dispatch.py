"""Laws of dispatch: nothing lost, order kept, gathers equal scatters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import pallas
from mom_jax.routing import dispatch


def _random(seed, N=37, A=3, G=5, none=0.2):
  rng = np.random.default_rng(seed)
  group_NA = np.stack([rng.permutation(G)[:A] for _ in range(N)])
  group_NA[rng.random((N, A)) < none] = -1
  token_R = jnp.repeat(jnp.arange(N), A)
  return token_R, jnp.asarray(group_NA.reshape(-1)), rng


@pytest.mark.parametrize('align', [1, 8])
@pytest.mark.parametrize('seed', range(3))
def test_rows_are_contiguous_in_time_order_and_aligned(align, seed):
  token_R, group_R, _ = _random(seed)
  layout = dispatch.group(
      token_R, group_R, num_tokens=37, num_groups=5, align=align,
      rows_per_token=3)
  for g in range(5):
    start, count = int(layout.start_G[g]), int(layout.count_G[g])
    assert start % align == 0
    rows = np.asarray(layout.row_P[start : start + count])
    want = np.flatnonzero(np.asarray(group_R) == g)
    np.testing.assert_array_equal(rows, want)
    padded = -(-count // align) * align
    np.testing.assert_array_equal(
        layout.group_P[start : start + padded], np.full(padded, g)
    )
    assert (np.asarray(layout.row_P[start + count : start + padded])
            == len(token_R)).all()
  taken = int((group_R >= 0).sum())
  assert int(layout.count_G.sum()) == taken
  assert int((layout.row_P < len(token_R)).sum()) == taken


def test_capacity_is_an_array_of_groups():
  token_R, group_R, _ = _random(3)
  layout = dispatch.group(
      token_R, group_R, num_tokens=37, num_groups=5, rows_per_token=3,
      capacity=30)
  row_GP = np.asarray(layout.row_P).reshape(5, 30)
  for g in range(5):
    want = np.flatnonzero(np.asarray(group_R) == g)
    np.testing.assert_array_equal(row_GP[g, :len(want)], want)
    assert (row_GP[g, len(want):] == len(token_R)).all()
  np.testing.assert_array_equal(layout.group_P, np.repeat(np.arange(5), 30))


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize('align', [1, 8])
@pytest.mark.parametrize('rows_per_token', [3, None])
def test_metadata_comes_along_with_its_tokens(
    rows_per_token, align, platform, monkeypatch):
  """Those of the token at each position; padding holds zeros."""
  monkeypatch.setattr(pallas, 'platform', lambda: platform)
  token_R, group_R, rng = _random(11)
  metadata = [jnp.asarray(rng.integers(1, 99, 37)) for _ in range(2)]
  layout = dispatch.group(
      token_R, group_R, num_tokens=37, num_groups=5, align=align,
      rows_per_token=rows_per_token, metadata=metadata)
  row_P = np.asarray(layout.row_P)
  real_P = row_P < len(token_R)
  assert real_P.any() and not real_P.all()
  token_P = np.asarray(token_R)[np.minimum(row_P, len(token_R) - 1)]
  for got_P, x_N in zip(layout.metadata, metadata, strict=True):
    want_P = np.where(real_P, np.asarray(x_N)[token_P], 0)
    np.testing.assert_array_equal(got_P, want_P)


@pytest.mark.parametrize('rows_per_token', [3, None])
def test_round_trip_and_gradients_equal_the_dense_form(rows_per_token):
  """gather, a map per group, ungroup = sum over groups of masked maps."""
  token_R, group_R, rng = _random(7)
  N, D, G = 37, 4, 5
  x_ND = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
  w_GD = jnp.asarray(rng.normal(size=(G, D)), jnp.float32)
  weight_R = jnp.asarray(rng.random(len(token_R)), jnp.float32)

  def grouped(x_ND, w_GD, weight_R):
    layout = dispatch.group(
        token_R, group_R, num_tokens=N, num_groups=G, align=8,
        rows_per_token=rows_per_token)
    x_PD = dispatch.gather(x_ND, layout)
    y_PD = jnp.tanh(x_PD * w_GD[layout.group_P])
    return dispatch.ungroup(y_PD, layout, weight_R, N)

  def dense(x_ND, w_GD, weight_R):
    x_RD, w_RD = x_ND[token_R], w_GD[group_R]
    y_RD = jnp.tanh(x_RD * w_RD) * (weight_R * (group_R >= 0))[:, None]
    return jax.ops.segment_sum(y_RD, token_R, N)

  np.testing.assert_allclose(
      grouped(x_ND, w_GD, weight_R), dense(x_ND, w_GD, weight_R), atol=1e-6
  )
  loss = lambda f: lambda *a: (f(*a) ** 2).sum()
  got = jax.grad(loss(grouped), (0, 1, 2))(x_ND, w_GD, weight_R)
  want = jax.grad(loss(dense), (0, 1, 2))(x_ND, w_GD, weight_R)
  for g, w in zip(got, want):
    np.testing.assert_allclose(g, w, atol=1e-5)


def test_everything_to_one_group_fits():
  layout = dispatch.group(
      jnp.arange(100), jnp.zeros(100, int), num_tokens=100, num_groups=7,
      align=16, rows_per_token=1,
  )
  assert int(layout.count_G[0]) == 100
  assert layout.row_P.shape[0] == dispatch.num_positions(100, 7, 16)


def test_every_split_fits_into_the_positions():
  """The bound holds for the worst split: one row more than whole chunks."""
  group_R = jnp.asarray([0] * 17 + [1] * 17 + [2] * 1)
  layout = dispatch.group(
      jnp.arange(35), group_R, num_tokens=35, num_groups=3, align=16
  )
  assert int((layout.row_P < 35).sum()) == 35
