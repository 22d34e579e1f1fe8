"""The harness itself: what it mends and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
import triton_interpreter


@triton.jit
def _product(x, w, y, n: tl.constexpr):
  at = tl.arange(0, n)
  place = at[:, None] * n + at[None, :]
  sums = tl.zeros((n, n), tl.float32)
  for _ in range(2):
    sums = tl.dot(
        tl.load(x + place), tl.load(w + place), sums, input_precision='ieee')
  tl.store(y + place, sums.to(y.dtype.element_ty))


@triton.jit
def _increment(x, x_out, n: tl.constexpr, wide: tl.constexpr):
  at = tl.program_id(0) * n + tl.arange(0, n)
  value = tl.load(x + at)
  if wide:
    value = value.to(tl.float32)
  tl.store(x_out + at, value + value)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_products_round_once(dtype):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=(16, 16)), dtype) for _ in range(2))
  (got,) = triton_interpreter.run(
      _product, x, w, out=[jax.ShapeDtypeStruct((16, 16), dtype)], grid=(1,),
      n=16)
  wide = [np.asarray(a, np.float64) for a in (x, w)]
  want = 2 * wide[0] @ wide[1]
  np.testing.assert_allclose(
      np.asarray(got, np.float64), want, atol=1e-5,
      rtol=float(jnp.finfo(dtype).eps) / 2 * 1.01)


def test_aliases_share_memory_and_unwritten_outputs_are_nan():
  x = jnp.arange(32, dtype=jnp.float32)
  shape = jax.ShapeDtypeStruct((32,), jnp.float32)
  run = lambda **settings: triton_interpreter.run(
      _increment, x, out=[shape], grid=(1,), n=16, wide=True, **settings)[0]
  np.testing.assert_array_equal(run(aliases={0: 0})[:16], 2 * x[:16])
  np.testing.assert_array_equal(run(aliases={0: 0})[16:], x[16:])
  assert np.isnan(run()[16:]).all()
  assert np.asarray(x)[1] == 1  # inputs are copied


def test_arithmetic_in_bfloat16_is_refused():
  x = jnp.arange(16, dtype=jnp.bfloat16)
  with pytest.raises(Exception, match='arithmetic in bfloat16'):
    triton_interpreter.run(
        _increment, x, out=[jax.ShapeDtypeStruct((16,), x.dtype)], grid=(1,),
        n=16, wide=False)
