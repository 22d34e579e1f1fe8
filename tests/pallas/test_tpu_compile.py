"""Every backend of every operation compiles for every TPU generation."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tpu_topology

from mom_jax import pallas
from mom_jax.pallas import common
from mom_jax.pallas.grouped_matmul import cases as matmul_cases

pytestmark = pytest.mark.tpu_compile
every_tpu = pytest.mark.parametrize('generation', tpu_topology.TOPOLOGIES)


def _with_gradients(run):
  """(result, gradients of its sum of squares) as a function of float args."""

  def both(*floats):
    loss = lambda *floats: (run(*floats).astype(jnp.float32) ** 2).sum()
    return jax.value_and_grad(loss, tuple(range(len(floats))))(*floats)

  return both


@every_tpu
def test_programs_are_made_for_the_tpu_in_scope(generation):
  seen = []

  def look(x):
    seen.append(common.platform())
    return x

  tpu_topology.compile_for(generation, look, jnp.zeros((8, 128)))
  assert seen == ['tpu']
  assert common.platform() == 'cpu'


@every_tpu
def test_xla_compiles(generation):
  """The plain backend: what a TPU runs where no kernel fits."""
  x, w, sizes = matmul_cases.CASES['uneven_with_rest'].operands()

  def run(x, w, sizes):
    matmul = functools.partial(
        pallas.grouped_matmul, group_sizes=sizes, backend='xla')
    return _with_gradients(matmul)(x, w)

  compiled = tpu_topology.compile_for(generation, run, x, w, sizes)
  assert not tpu_topology.has_kernel(compiled)
