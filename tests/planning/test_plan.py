"""Plans: what compiled programs cost, which links carry it, what fits."""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest
import tiny_run

from mom_jax import chips, config, plan
from mom_jax.models import flops
from mom_jax.parallel import sharding
from mom_jax.planning import (
  compiled,
  cost,
  hlo,
  report,
  suggestions,
  traffic,
)
from mom_jax.training import step

ROOT = pathlib.Path(__file__).parents[2]
V5E = chips.topology('v5e-8')


def _places(topology):
  return [traffic.Place(s, c, 100000 * (s + 1) + i)
          for s in range(topology.slices) for i, c in enumerate(
              itertools.product(*map(range, topology.shape)))]


def _of(text, topology=V5E):
  return cost.of(text, topology, _places(topology))


# Topologies.


@pytest.mark.parametrize('name, count, devices, libtpu, slices', [
    ('v5e-16', 16, 16, 'v5e:4x4', 1),
    ('v5p-256', 128, 128, 'v5p:4x4x8', 1),
    ('v6e-256', 256, 256, 'v6e:16x16', 1),
    ('tpu7x-128', 64, 128, 'tpu7x:4x4x4', 1),
    ('2xv5e-256', 512, 512, 'v5e:16x16', 2),
    ('v5p:2x2x1', 4, 4, 'v5p:2x2x1', 1),
])
def test_names_of_topologies_are_those_of_cloud_tpu(
    name, count, devices, libtpu, slices):
  t = chips.topology(name)
  assert (t.chips, t.devices, t.libtpu, t.slices) == (
      count, devices, libtpu, slices)


def test_gpus_come_in_nodes():
  assert chips.topology('h100-64').slices == 8
  assert chips.topology('b200-4').slices == 1


@pytest.mark.parametrize('name, message', [
    ('v5p', 'is unknown; write CHIP-NUMBER'),
    ('v9-8', 'with a chip of v4, v5e'),
    ('v5p-255', 'is not offered; known: v5p-8, v5p-16'),
    ('v5p:4x4', 'must have 3 sides'),
    ('h100-12', 'whole nodes of 8'),
])
def test_unknown_topologies_are_named(name, message):
  with pytest.raises(ValueError, match=message):
    chips.topology(name)


def test_peak_is_of_a_device():
  assert chips.peak_flops('TPU v5p', 2) == 2 * 459e12
  assert chips.peak_flops('TPU7x', 1) == 2307e12 / 2
  assert chips.peak_flops('cpu', 1) is None


# Links.


def test_rings_are_twice_as_fast_as_lines():
  """A whole side of 16 is a ring; four chips of it, or a side of 4, are not."""
  v6e = chips.topology('v6e-256')
  line = lambda n: [traffic.Place(0, (0, y)) for y in range(n)]
  gather = lambda n, t: traffic.move('all-gather', 1e9, line(n), t)
  near, far, seconds, _ = gather(16, v6e)
  assert near == pytest.approx(1e9 * 15 / 16) and far == 0
  assert seconds == pytest.approx(near / 200e9)
  assert gather(4, v6e)[2] == pytest.approx(0.75e9 / 100e9)
  assert gather(4, chips.topology('v5e-16'))[2] == pytest.approx(0.75e9 / 50e9)
  both = traffic.move('all-gather', 1e9, _places(v6e), v6e)
  assert both[2] == pytest.approx(1e9 * 255 / 256 / 400e9)


def test_an_all_reduce_is_a_scatter_and_a_gather():
  places = _places(V5E)
  move = lambda kind: traffic.move(kind, 8e6, places, V5E)
  assert move('all-reduce') == pytest.approx(
      [a + b for a, b in zip(move('all-gather'), move('reduce-scatter'))])


def test_an_all_to_all_of_a_ring_takes_a_quarter_of_a_gather():
  v6e = chips.topology('v6e-256')
  ring = [traffic.Place(0, (x, 0)) for x in range(16)]
  gather = traffic.move('all-gather', 16e6, ring, v6e)[2]
  assert traffic.move('all-to-all', 1e6, ring, v6e)[2] == pytest.approx(
      gather / 4)


def test_chips_far_apart_share_links():
  v6e = chips.topology('v6e-256')
  every = lambda step: [traffic.Place(0, (0, step * y)) for y in range(4)]
  near, apart = (traffic.move('all-gather', 1e6, every(s), v6e)[2]
                 for s in (1, 2))
  assert apart == pytest.approx(2 * near)


def test_slices_talk_once_over_the_network():
  two = chips.topology('2xv5e-8')
  near, far, _, seconds = traffic.move('all-reduce', 8e6, _places(two), two)
  assert near == pytest.approx(2 * 8e6 * 7 / 8)
  assert far == pytest.approx(2 * 8e6 / 8 / 2)
  assert seconds == pytest.approx(far / 3.125e9)
  alone = [traffic.Place(s, (0, 0)) for s in range(2)]
  assert traffic.move('all-gather', 8e6, alone, two)[:2] == (0, 4e6)


def test_one_device_moves_nothing():
  assert traffic.move('all-reduce', 8e6, _places(V5E)[:1], V5E) == (0,) * 4
  cores = [traffic.Place(0, (0, 0, 0))] * 2  # of one tpu7x chip
  tpu7x = chips.topology('tpu7x-8')
  assert traffic.move('all-gather', 8e6, cores, tpu7x) == (0,) * 4


@pytest.mark.parametrize('text, wanted', [
    ('{{0,2},{1,3}}', [0, 2]),
    ('[2,4]<=[8]', [0, 1, 2, 3]),
    ('[4,2]<=[2,4]T(1,0)', [0, 4]),
    ("mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
    ("mesh['a'=4,'b'=2] {'b'}", [0, 1]),
    ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", [0, 1, 4, 5]),
    ("mesh['a'=8] {'a':(4)2}", [0, 1]),
    ('{}', list(range(8))),
])
def test_groups_are_read_in_every_notation(text, wanted):
  line = (f'  %r = f32[8]{{0}} all-reduce(%p), replica_groups={text},'
          ' use_global_device_ids=true, to_apply=%add')
  assert traffic.group(hlo._instruction(line), 8) == wanted


# Programs.


@pytest.fixture(scope='module')
def mesh():
  return jax.make_mesh(
      (8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))


def test_loops_count_as_often_as_they_turn(mesh):
  """Seven turns of a gathered product and a sum over all devices."""

  def step(x, w):
    def turn(x, w):
      w = jax.lax.all_gather(w, 'x', tiled=True)
      y = jnp.tanh(x @ w)
      return y + jax.lax.psum(y, 'x'), None
    return jax.lax.scan(turn, x, w)[0]

  spread = lambda *spec: NamedSharding(mesh, P(*spec))
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=spread('x'))
  w = jax.ShapeDtypeStruct((7, 32, 32), jnp.float32,
                           sharding=spread(None, 'x'))
  text = jax.jit(jax.shard_map(
      step, mesh=mesh, in_specs=(P('x'), P(None, 'x')), out_specs=P('x'),
  )).lower(x, w).compile().as_text()
  got = _of(text)
  assert got.flops == 7 * 2 * 8 * 32 * 32
  assert not got.unknown
  sums = {}
  for c, n in got.collectives:
    sums[c.kind] = sums.get(c.kind, 0) + n * c.ici_bytes
    assert c.members == 8
  assert sums['all-gather'] == 7 * 32 * 32 * 4 * 7 / 8
  assert sums['all-reduce'] == 7 * 2 * 8 * 32 * 4 * 7 / 8
  assert got.exposed == pytest.approx(got.ici_s) and got.ici_s > 0


def test_a_loop_that_depends_on_data_is_listed():
  count = jax.jit(lambda n: jax.lax.while_loop(
      lambda x: x @ x < n, lambda x: jnp.sin(x) + 1, jnp.ones(8)))
  got = _of(count.lower(3.0).compile().as_text())
  assert len(got.unknown) == 1


_TPU = pathlib.Path(__file__).with_name('scheduled_step.hlo').read_text()


def test_programs_for_tpus_are_read():
  """What stands in VMEM is free, what is sliced is read in part, and so on."""
  module = hlo.parse(_TPU)
  entry = module.entry
  assert module.turns(entry.by_name['w'], entry) == 4  # 3, 5, 7, 9
  got = _of(_TPU)
  kinds = [(c.kind, c.hidden, n, c.ici_bytes) for c, n in got.collectives]
  assert kinds == [
      ('all-gather', True, 1, 128 * 128 * 2 * 7 / 8),
      ('reduce-scatter', False, 1, 64 * 128 * 2 * 7 / 8)]
  walk = cost._Walk(module, V5E, _places(V5E))
  body = walk.computation('turn')
  assert body.hbm_bytes == 1024  # one row of ten read, nothing written
  assert walk._flops(entry.by_name['kernel'], entry) == 1000  # as it declares
  assert got.exposed == pytest.approx(sum(
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
    # No more than there is room for.
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
  got = _of(text, two)
  (one, times), = got.collectives
  assert (one.kind, one.members, times, one.hidden) == (wanted, 2, 1, True)
  assert (one.ici_bytes, one.dcn_bytes) == (0, rows * 128 * 4)
  walk = cost._Walk(hlo.parse(text), two, _places(two))
  beside = cost.Cost()
  walk._instruction(
      walk.module.entry.by_name['dot'], walk.module.entry, beside)
  assert got.exposed <= one.dcn_s - beside.busy < one.dcn_s
  offsets = _NETWORK.format(kind=kind, target=target, part=2)
  assert not _of(offsets, two).collectives


def _between(module):
  """What runs between start and end of the gather, if it is shorter."""
  walk = cost._Walk(module, V5E, _places(V5E))
  total = cost.Cost()
  total.add(walk.computation('turn'), 4)
  total.add(walk.computation('until'), 4)
  walk._instruction(module.entry.by_name['v'], module.entry, total)
  return total.busy


@pytest.mark.parametrize('b, m, k, n', [(1, 4, 8, 16), (5, 4, 8, 16)])
def test_products_written_as_convolutions_cost_what_products_cost(b, m, k, n):
  """Batches are places of a window whose holes keep them apart."""
  window = (f'window={{size={b} stride={max(b - 1, 1)} pad=0_0'
            f' lhs_dilate={b}}}' if b > 1 else 'window={size=1}')
  text = f"""
  %l = bf16[{b},{m},{k}]{{2,1,0}} parameter(0)
  %r = bf16[{b},{k},{n}]{{2,1,0}} parameter(1)
  %c = bf16[{b},{m},{n}]{{2,1,0}} convolution(%l, %r), {window}, \
dim_labels=0bf_0io->0bf"""
  lines = [hlo._instruction(line) for line in text.strip('\n').split('\n')]
  here = hlo.Computation('c', lines)
  assert cost.convolution_flops(lines[-1], here) == 2 * b * m * k * n


def test_memory_is_read_of_allocations_before_there_is_code(small):
  """Of HBM alone; what kernels use for themselves is no allocation."""
  mesh = sharding.make_mesh(fsdp=8, data=1)
  _, abstract = step.init(small, mesh)
  text = '\n'.join(f'allocation {k}: size {line}' for k, line in enumerate((
      '7, page 0, thread-local:', '5, color 1, page 0, preallocated-temp:',
      '1000000, page 0, parameter 3, shape |f32[8]| at ShapeIndex {}:',
      '2000000, page 0, parameter 4, shape |f32[8]| at ShapeIndex {}:',
      '40, page 0, output shape is |(f32[8])|:',
      '300, page 0, preallocated-temp:')))
  got = compiled.scheduled_memory(text + '\n value: <1> size 9\n', abstract)
  assert sum(got.values()) == 3000340
  assert got['activations and temporaries'] == 300
  assert got | compiled.state_bytes(abstract) == got


def test_text_without_a_program_is_an_error():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('nothing')


# Plans.


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  return tiny_run.make_config(
      tmp_path_factory.mktemp('plan'), 'model.pattern=attention/mlp',
      'model.num_layers=2', 'mesh.fsdp=8', 'mesh.data=1')


@pytest.fixture(scope='module')
def planned(small):
  return plan.make(small, chips.topology('h100-8'), tokens=1e9)


def test_gpus_are_planned_by_arithmetic(small, planned):
  """The model's own FLOPs, at least; parameters and moments to the byte."""
  batch = small.data.batch_size * small.data.seq_len
  assert planned['model_flops'] == pytest.approx(
      flops.train_flops_per_token(small) * batch / 8)
  # Causal attention is computed with all its masked half.
  assert 1 <= planned['flops'] / planned['model_flops'] < 2
  assert planned['fits'] and planned['change'] is None
  memory = planned['memory']
  assert 4 * planned['parameters'] / 8 <= memory['parameters'] < (
      4 * planned['parameters'])
  assert memory['optimizer'] >= 2 * memory['parameters']
  assert {r['kind'] for r in planned['traffic']} == {
      'all-gather', 'reduce-scatter', 'all-reduce'}
  assert planned['dcn_bytes'] == 0 < planned['ici_bytes']
  assert planned['days'] == pytest.approx(
      1e9 / planned['tokens_per_s'] / 86400)
  json.dumps(planned)
  text = report.text(planned)
  for part in ('8 h100', 'nothing compiled', 'Memory of a chip', 'fits',
               'all-gather', 'limited by', 'tokens/s', 'days for 1 B tokens'):
    assert part in text


def test_the_change_to_make_is_named(small):
  change = lambda cfg, state, rest, devices=1: suggestions.change(
      cfg, {'data': devices}, {'parameters': float(state)},
      float(state + rest), 10.0)
  assert change(small, 5, 5) is None
  assert 'config.mesh.fsdp' in change(small, 9.5, 5)
  assert 'config.train.grad_accum_steps=4.' in change(small, 5, 15)
  dots = config.override(small, ['model.remat=dots'])
  assert 'config.model.remat=full' in change(dots, 5, 15, devices=8)
  full = config.override(small, ['model.remat=full'])
  assert 'config.data.seq_len' in change(full, 5, 15, devices=8)


def test_a_sweep_tries_every_split_and_ranks(small, planned):
  cfgs = plan.meshes(small, ['fsdp', 'data'], 8)
  assert [(c.mesh.fsdp, c.mesh.data) for c in cfgs] == [
      (1, 8), (2, 4), (4, 2), (8, 1)]
  slow = planned | {'step_s': 2 * planned['step_s'], 'mesh': {'data': 8}}
  large = planned | {'fits': False, 'mesh': {'data': 2}}
  lines = report.ranking([large, slow, planned]).split('\n')
  assert 'fsdp=8' in lines[1] and 'data=8' in lines[2] and 'data=2' in lines[3]
  with pytest.raises(config.UserError, match='--sweep=wide is no axis'):
    plan.meshes(small, ['wide'], 8)
  with pytest.raises(config.UserError, match='does not divide the 12'):
    plan.meshes(small, ['data'], 12)


def test_a_mesh_that_does_not_fit_is_one_line(small):
  wrong = config.override(small, ['mesh.fsdp=3'])
  with pytest.raises(config.UserError, match='do not fit the 8 devices'):
    plan.make(wrong, chips.topology('h100-8'))


def test_without_libtpu_the_extra_is_named(small, monkeypatch):
  monkeypatch.setattr(compiled.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(config.UserError, match=r'mom_jax\[tpu-compile\]'):
    plan.make(small, V5E)


def _command(path, *flags):
  return subprocess.run(
      [sys.executable, '-m', 'mom_jax.plan', f'--config={path}', *flags],
      text=True, capture_output=True, timeout=500,
      env=os.environ | {'PYTHONPATH': str(ROOT)})


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_a_step_is_compiled_for_tpus_that_are_not_there(small, tmp_path):
  import tpu_topology
  tpu_topology.mesh('v5e')  # skips without libtpu
  wide = config.override(small, ['model.width=128', 'mesh.fsdp=-1'])
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(dataclasses.asdict(wide)))
  done = _command(path, '--topology=v5e-4', f'--json={tmp_path / "plan.json"}')
  assert done.returncode == 0, done.stderr
  got = json.loads((tmp_path / 'plan.json').read_text())
  assert got['mesh']['fsdp'] == 4 and 'v5e:2x2' in got['basis']
  assert got['flops'] >= got['model_flops'] > 0
  assert {'all-gather'} <= {r['kind'] for r in got['traffic']}
  turns = [r for r in got['sequence'] if r['turns'] == wide.model.repeats]
  assert turns, 'collectives inside of the layers turn with them'
  assert math.isclose(sum(got['memory'].values()), got['memory_used'])
  assert 'DOES NOT FIT' not in done.stdout
  done = _command(path, '--topology=v5e-4', '--quick',
                  f'--json={tmp_path / "quick.json"}')
  assert done.returncode == 0, done.stderr
  quick = json.loads((tmp_path / 'quick.json').read_text())
  assert got['memory'] == quick['memory'] | {
      'program': got['memory']['program']}
  for key in ('flops', 'hbm_bytes', 'traffic'):
    assert quick[key] == got[key], key
  assert quick['busy_s'] <= got['busy_s']


def test_plans_become_the_tables_of_the_documentation(planned, tmp_path):
  """A row a plan; of weak scaling, what is not hidden against a chip's own."""
  for chips_, exposed in ((1, 0.0), (4, 0.125)):
    one = planned | {
        'chips': chips_, 'exposed_s': exposed, 'bounds': dict(
            compute=0.5, HBM=0.25, ICI=0.125)}
    (tmp_path / f'weak-{chips_}.json').write_text(json.dumps(one))
  (tmp_path / 'large.json').write_text(json.dumps(one))
  done = subprocess.run(
      [sys.executable, ROOT / 'scripts/scaling_report.py', tmp_path], text=True,
      capture_output=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stderr
  recipes, weak = done.stdout.split('\n\n')
  assert recipes.count('\n') == 2 and '| 500 | 250 | 125 |' in recipes
  lines = weak.strip().split('\n')
  assert '| 125.0 | 0.0 |' in lines[2] and '| 100.0% |' in lines[2]
  assert '| 125.0 | 125.0 |' in lines[3] and '| 80.0% |' in lines[3]
