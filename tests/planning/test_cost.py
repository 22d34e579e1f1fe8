"""Costs of compiled programs: FLOPs, bytes, collectives, overlap."""

import itertools
import pathlib

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from mom_jax import chips
from mom_jax.planning import cost, hlo, traffic

V5E = chips.topology('v5e-8')


def _locations(topology):
  return [traffic.Location(s, c, 100000 * (s + 1) + i)
          for s in range(topology.slices) for i, c in enumerate(
              itertools.product(*map(range, topology.shape)))]


def _cost(text, topology=V5E):
  return cost.program_cost(text, topology, _locations(topology))


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh(
      (8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))


def test_loops_count_times_their_iterations(mesh):
  """Seven iterations of a gathered product and a sum over all devices."""

  def step(x, w):
    def body(x, w):
      w = jax.lax.all_gather(w, 'x', tiled=True)
      y = jnp.tanh(x @ w)
      return y + jax.lax.psum(y, 'x'), None
    return jax.lax.scan(body, x, w)[0]

  spread = lambda *spec: NamedSharding(mesh, P(*spec))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=spread('x'))
  w = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32,
                           sharding=spread(None, 'x'))
  text = jax.jit(jax.shard_map(
      step, mesh=mesh, in_specs=(P('x'), P(None, 'x')), out_specs=P('x'),
  )).lower(x, w).compile().as_text()
  got = _cost(text)
  assert got.flops == 7 * 2 * 8 * 32 * 32
  assert not got.unknown_loops
  sums = {}
  for c, n in got.collectives:
    sums[c.kind] = sums.get(c.kind, 0) + n * c.transfer.ici_bytes
    assert c.group_size == 8
  assert sums['all-gather'] == 7 * 32 * 32 * 4 * 7 / 8
  assert sums['all-reduce'] == 7 * 2 * 8 * 32 * 4 * 7 / 8
  assert got.exposed_s == pytest.approx(got.ici_s) and got.ici_s > 0


def test_a_loop_that_depends_on_data_is_listed():
  count = jax.jit(lambda n: jax.lax.while_loop(
      lambda x: x @ x < n, lambda x: jnp.sin(x) + 1, jnp.ones(8)))
  got = _cost(count.lower(3.0).compile().as_text())
  assert len(got.unknown_loops) == 1


_TPU = pathlib.Path(__file__).with_name('scheduled_step.hlo').read_text()


def test_programs_for_tpus_are_read():
  """What stands in VMEM is free, what is sliced is read in part, and so on."""
  module = hlo.parse(_TPU)
  entry = module.entry
  assert module.iterations(entry.by_name['w'], entry) == 4  # 3, 5, 7, 9
  got = _cost(_TPU)
  kinds = [(c.kind, c.overlapped, n, c.transfer.ici_bytes)
           for c, n in got.collectives]
  assert kinds == [
      ('all-gather', True, 1, 128 * 128 * 2 * 7 / 8),
      ('reduce-scatter', False, 1, 64 * 128 * 2 * 7 / 8)]
  model = cost.CostModel(module, V5E, _locations(V5E))
  body = model.computation('turn')
  assert body.hbm_bytes == 1024  # one row of ten read, nothing written
  kernel = model.instruction(entry.by_name['kernel'], entry)
  assert kernel.flops == 1000  # as it declares
  assert got.exposed_s == pytest.approx(sum(
      c.seconds for c, _ in got.collectives) - _between(module))


_NETWORK = """HloModule jit_step, num_partitions=4
ENTRY %main (x: f32[64,128], y: f32[128,128]) -> f32[16,128] {{
  %x = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  %y = f32[128,128]{{1,0:T(8,128)}} parameter(1)
  %t = token[] after-all()
  %send = (f32[64,128]{{1,0}}, u32[]{{:S(2)}}, token[]) send(%x, %t), \
frontend_attributes={{_xla_host_transfer_rendezvous="r_0",\
_xla_megascale_ragged_operand_index="{part}",_xla_megascale_target={target},\
_xla_megascale_transfer_type="{kind}"}}, backend_config={{"a":["b"]}}
  %recv = (f32[16,128]{{1,0}}, u32[]{{:S(2)}}, token[]) recv(%t), \
frontend_attributes={{_xla_host_transfer_rendezvous="r_0",\
_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %send-done = token[] send-done(%send)
  %dot = f32[128,128]{{1,0}} dot(%y, %y), lhs_contracting_dims={{1}}, \
rhs_contracting_dims={{0}}
  %recv-done = (f32[16,128]{{1,0}}, token[]) recv-done(%recv)
  ROOT %got = f32[16,128]{{1,0}} get-tuple-element(%recv-done), index=0
}}
"""


@pytest.mark.parametrize('kind, target, wanted, rows', [
    ('ALL_TO_ALL', '{{100000,200000},{100001,200001}}', 'all-to-all', 32),
    # No more than the capacity of the receiver.
    ('RAGGED_ALL_TO_ALL', '{{100000,200000},{100001,200001}}',
     'ragged-all-to-all', 8),
    ('ALL_REDUCE', '"{1,2}x{0:3}"', 'all-reduce', 64),
    ('ALL_GATHER', '"{1:2}x{0:3}"', 'all-gather', 64),
    ('ONE_TO_ONE', '{{100001->200000},{200000->100001}}', 'collective-permute',
     64),
])
def test_what_crosses_between_slices_is_counted(kind, target, wanted, rows):
  """It ends with its receive: what runs until then runs beside it."""
  two = chips.topology('2xv5e-4')
  text = _NETWORK.format(kind=kind, target=target, part=0)
  got = _cost(text, two)
  (one, times), = got.collectives
  assert times == 1 and one.overlapped
  assert (one.kind, one.group_size) == (wanted, 2)
  assert one.transfer[:2] == (0, rows * 128 * 4)
  model = cost.CostModel(hlo.parse(text), two, _locations(two))
  entry = model.module.entry
  beside = model.instruction(entry.by_name['dot'], entry)
  dcn_s = one.transfer.dcn_s
  assert got.exposed_s <= dcn_s - beside.busy_s < dcn_s
  offsets = _NETWORK.format(kind=kind, target=target, part=2)
  assert not _cost(offsets, two).collectives


def _between(module):
  """What runs between start and end of the gather, if it is shorter."""
  model = cost.CostModel(module, V5E, _locations(V5E))
  total = cost.Cost()
  total.add(model.computation('turn'), 4)
  total.add(model.computation('until'), 4)
  total.add(model.instruction(module.entry.by_name['v'], module.entry))
  return total.busy_s


@pytest.mark.parametrize('b, m, k, n', [(1, 4, 8, 16), (5, 4, 8, 16)])
def test_products_written_as_convolutions_cost_what_products_cost(b, m, k, n):
  """Batches are positions of a window whose holes keep them apart."""
  window = (f'window={{size={b} stride={max(b - 1, 1)} pad=0_0'
            f' lhs_dilate={b}}}' if b > 1 else 'window={size=1}')
  text = f"""
  %l = bf16[{b},{m},{k}]{{2,1,0}} parameter(0)
  %r = bf16[{b},{k},{n}]{{2,1,0}} parameter(1)
  %c = bf16[{b},{m},{n}]{{2,1,0}} convolution(%l, %r), {window}, \
dim_labels=0bf_0io->0bf"""
  lines = [hlo.parse_instruction(line) for line in text.strip('\n').split('\n')]
  here = hlo.Computation('c', lines)
  assert cost.convolution_flops(lines[-1], here) == 2 * b * m * k * n


def test_text_without_a_program_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('nothing')
