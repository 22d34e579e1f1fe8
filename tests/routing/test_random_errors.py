"""Wrong decisions at random: as many as asked for, and of the right kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import E, allowed, route

from mom_jax import routing


@pytest.mark.parametrize('error_prob', [0.0, 0.1, 1.0])
@pytest.mark.parametrize('name', ['threshold', 'token_choice'])
def test_errors_are_as_many_as_asked_for(error_prob, name):
  """Of all decisions; with exact_k each replaces one that was right."""
  mask = allowed(np.arange(4000).reshape(2, -1) % 3 - 1)
  inputs = routing.RouterInputs(
      jax.random.normal(jax.random.key(1), mask.shape), mask, jnp.full(E, 0.5))
  chosen = route(name, inputs, top_k=1)
  selected, router = chosen.selected_BTE, routing.get(name)
  got = routing.with_random_errors(
      jax.random.key(0), error_prob, router, selected, chosen.probs_BTE, inputs)
  np.testing.assert_array_equal(got.weight_BTE, chosen.probs_BTE)
  got = got.selected_BTE
  assert not np.asarray(got & ~mask).any()
  changed = np.asarray(got ^ selected).sum()
  assert router.exact_k == (name == 'token_choice')
  if router.exact_k:
    np.testing.assert_array_equal(got.sum(-1), selected.sum(-1))
    fraction = changed / 2 / selected.sum()
  else:
    fraction = changed / mask.sum()
  np.testing.assert_allclose(fraction, error_prob, atol=0.012)


def test_an_error_needs_another_expert():
  """Two of two cannot be wrong, two of three can in one of them."""
  mask = jnp.asarray([[[True] * 3 + [False] * 2, [False] * 3 + [True] * 2]])
  selected = mask & jnp.asarray([True, True, False, True, True])[None, None]
  got = routing.with_random_errors(
      jax.random.key(0), 1.0, routing.get('token_choice'), selected,
      mask.astype(jnp.float32),
      routing.RouterInputs(mask.astype(jnp.float32), mask)).selected_BTE
  assert got[0, 0].tolist() in ([False, True, True, False, False],
                                [True, False, True, False, False])
  np.testing.assert_array_equal(got[0, 1], selected[0, 1])
