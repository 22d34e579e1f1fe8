"""Rows go to the ranks that own their groups and back: none is lost."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import tpu_topology

from mom_jax import chips
from mom_jax.parallel import all_to_all, per_device, sharding
from mom_jax.planning import compiled, cost, hlo, traffic
from mom_jax.routing import dispatch

RANKS, B, T, D, G = 4, 4, 6, 3, 8
# Fake devices have no slices; an axis that may span some is as good.
MESHES = {
    'one': {},
    'slice': dict(expert=RANKS),
    'slices': dict(dcn_expert=2, expert=RANKS // 2),
    'a_chip_each': dict(dcn_expert=RANKS),
}


def test_placement_is_even_and_keeps_the_order_where_it_can():
  order = lambda *args: all_to_all.place_groups(*args).group_OS.tolist()
  assert order([1.0] * 4, 2) == [[0, 1], [2, 3]]
  assert order([1.0] * 3, 2) == [[0, 1], [2, -1]]
  # A routed memory and the shared one, on a device each.
  assert order([1.0, 1.0], 2) == [[0], [1]]
  assert order([1 / 3] * 6 + [1.0], 3) == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
  # In order, the second rank would have 1.8 rows per token; so it has 1.6.
  assert order([0.4] * 5 + [1.0], 2) == [[3, 5, -1, -1], [0, 1, 2, 4]]
  assert order([1.0, 1.0], 4) == [[0], [1], [-1], [-1]]


def test_slots_name_ranks_and_parameters_follow():
  placement = all_to_all.place_groups([0.4] * 5 + [1.0], 2)
  assert not placement.is_identity and placement.groups_per_rank == 4
  groups = jnp.asarray([5, 3, 0, 4, -1])
  slots = placement.rank_slot(groups)
  np.testing.assert_array_equal(slots, [1, 0, 4, 7, -1])
  moved = placement.to_rank_order(jnp.arange(6) * 10)
  np.testing.assert_array_equal(moved[slots[:4]], groups[:4] * 10)
  assert all_to_all.place_groups([1.0] * 4, 2).is_identity
  assert not all_to_all.place_groups([1.0] * 3, 2).is_identity


ROUTINGS = {
    'random': np.random.default_rng(0).integers(-1, G, (B, T)),
    'all_to_one': np.full((B, T), 5),
    'none': np.full((B, T), -1),
    'one_row': np.where(np.arange(B * T).reshape(B, T) == 7, 2, -1),
}


def _mesh(name):
  sizes = MESHES[name]
  return sharding.make_mesh(
      data=1, **sizes, devices=jax.devices()[:math.prod(sizes.values())])


def _experts(x_BTD, group_BT, w_GD, form, groups=G):
  """y = sin(x w_g) / 2 on the ranks that own the rows."""
  placement = all_to_all.place_groups(
      [1.0] * groups, sharding.axis_size('expert'))
  per_rank = placement.groups_per_rank

  def fn(x_RD, count_G):
    w_RD = jnp.repeat(
        w[0], count_G, axis=0, total_repeat_length=len(x_RD))
    real_R = jnp.arange(len(x_RD)) < count_G.sum()
    return jnp.where(real_R[:, None], jnp.sin(x_RD * w_RD), 0)

  def local(batched, w_GD):
    x_BTD, group_BT = batched
    w[0] = w_GD
    x_ND, N = x_BTD.reshape(group_BT.size, -1), group_BT.size
    layout_of = functools.partial(
        dispatch.group, jnp.arange(N), num_tokens=N, rows_per_token=1)
    slot_N = placement.rank_slot(group_BT.reshape(-1))
    if form == 'experts':
      layout = layout_of(slot_N, num_groups=placement.num_slots)
      y_PD = all_to_all.on_owning_ranks(
          fn, dispatch.gather(x_ND, layout), layout, placement.num_ranks)
      y_ND = dispatch.ungroup(y_PD, layout, jnp.full(N, 0.5), N)
    else:
      b = len(x_BTD)
      sample_N = jnp.repeat(jnp.arange(b), T)
      rows = all_to_all.plan_rows_on_ranks(
          jnp.arange(N),
          jnp.where(slot_N < 0, -1, slot_N * b + sample_N),
          num_tokens=N, num_samples=b, placement=placement, align=4,
          rows_per_token=1, max_rows=N,
          metadata=[slot_N % per_rank])
      rows = jax.jit(lambda rows: rows)(rows)  # a value
      samples = len(rows.layout.start_G) // per_rank
      group_P = rows.layout.group_P // samples
      same_P, = rows.layout.metadata  # they travel as well
      w_PD = (w_GD[jnp.maximum(group_P, 0)] + w_GD[same_P]) / 2
      y_PD = jnp.sin(rows.gather(x_ND) * w_PD)
      y_ND = rows.ungroup(y_PD, jnp.full(N, 0.5))
    return y_ND.reshape(x_BTD.shape)

  w = [None]
  return per_device.batch_local(local, shared=P('expert'))(
      (x_BTD, group_BT), placement.to_rank_order(w_GD))


@functools.cache
def _compiled(form, mesh, ragged, groups):
  del ragged
  loss = lambda x, w, group: (
      (jnp.cos(y := _experts(x, group, w, form, groups))).sum(), y)
  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

  def call(*args):
    with jax.set_mesh(_mesh(mesh)):
      return jax.device_get(run(*args))
  return call


def _ragged_all_to_all(x, out, starts, sizes, there, got, *, axis_name):
  """What JAX says that it does, with collectives that CPUs have."""
  tell = lambda a: jax.lax.all_to_all(a, axis_name, 0, 0, tiled=True)
  every_x = jax.lax.all_gather(x, axis_name)
  starts, sizes, there = map(tell, (starts, sizes, there))
  each = len(starts) // len(every_x)
  # What is said to come, comes; or all is wrong.
  out = jnp.where((sizes == got).all(), out, jnp.nan).astype(out.dtype)
  for i, (start, size, to) in enumerate(zip(starts, sizes, there)):
    place = jnp.arange(len(out))
    from_ = jnp.clip(start + place - to, 0, len(x) - 1)
    mine = (place >= to) & (place < to + size)
    out = jnp.where(
        mine.reshape(-1, *(1,) * (x.ndim - 1)), every_x[i // each][from_], out)
  return out


@pytest.mark.parametrize('form', ['experts', 'rows'])
@pytest.mark.parametrize('ragged', [False, True])
@pytest.mark.parametrize('mesh, groups', [
    ('slice', G), ('slices', G), ('slices', 5),
    pytest.param('a_chip_each', 3, marks=pytest.mark.slow)])
def test_four_ranks_do_what_one_device_does(
    form, ragged, mesh, groups, monkeypatch):
  """Result and gradients, whatever the imbalance, by both kinds of
  all-to-all, in one hop and in two, of groups that ranks divide or not.
  """
  if ragged:
    monkeypatch.setattr(all_to_all.pallas, 'platform', lambda: 'tpu')
    monkeypatch.setattr(jax.lax, 'ragged_all_to_all', _ragged_all_to_all)
  rng = np.random.default_rng(1)
  x = rng.normal(size=(B, T, D)).astype(np.float32)
  w = rng.normal(size=(groups, D)).astype(np.float32)
  for name, group in ROUTINGS.items():
    group = np.minimum(group, groups - 1)
    args = x, w, group.astype(np.int32)
    got = _compiled(form, mesh, ragged, groups)(*args)
    want = _compiled('rows', 'one', False, groups)(*args)
    direct = np.where(
        (group >= 0)[..., None], np.sin(x * w[group]) / 2, 0)
    np.testing.assert_allclose(want[0][1], direct, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b, name=name: np.testing.assert_allclose(
        a, b, atol=1e-5, err_msg=name), got, want)


def test_routed_rows_are_a_value():
  """They print, come out of a compiled function and go into another one."""
  token_R = jnp.arange(8)

  def route():
    return all_to_all.plan_rows_on_ranks(
        token_R, token_R % 3, num_tokens=8, num_samples=1,
        placement=all_to_all.place_groups([1.0] * 3, 1), align=2,
        rows_per_token=1, max_rows=8)

  rows = jax.jit(route)()
  assert '<function' not in repr(rows)
  x_ND = jnp.arange(16.0).reshape(8, 2)
  got = jax.jit(lambda rows: rows.ungroup(rows.gather(x_ND), jnp.ones(8)))(rows)
  np.testing.assert_array_equal(got, x_ND)


@pytest.mark.parametrize('mesh', ['slice', 'slices'])
def test_all_rows_at_one_rank_take_the_memory_of_one_device(
    mesh, monkeypatch):
  """A rank has room for as many rows as a device has by itself, and for no more
  between two hops.
  """
  seen, buffer_rows, plan_sends = [], [], all_to_all.plan_sends

  def spied(*args):
    plan = plan_sends(*args)
    buffer_rows.append([hop.buffer_rows for hop in plan.hops])
    return plan

  monkeypatch.setattr(all_to_all, 'plan_sends', spied)

  def fn(x_RD, count_G):
    seen.append(len(x_RD))
    return x_RD * count_G.sum()

  def local(x_BTD, group_BT):
    N = group_BT.size
    layout = dispatch.group(
        jnp.arange(N), group_BT.reshape(-1), num_tokens=N, num_groups=G,
        rows_per_token=1)
    y_PD = all_to_all.on_owning_ranks(
        fn, dispatch.gather(x_BTD.reshape(N, D), layout), layout, RANKS)
    return dispatch.ungroup(y_PD, layout, jnp.ones(N), N).reshape(x_BTD.shape)

  run = per_device.batch_local(lambda both, _: local(*both))
  with jax.set_mesh(_mesh(mesh)):
    jax.eval_shape(
        run, (jnp.zeros((RANKS, 16, D)), jnp.zeros((RANKS, 16), int)), ())
  assert seen and set(seen) == {16}
  assert buffer_rows == [[16] if mesh == 'slice' else [8, 16]]


def _groups(text, kind):
  """Who exchanges with whom, by the partitions of a compiled program."""
  found = set()
  for computation in hlo.parse(text).computations.values():
    for i in computation.instructions:
      if traffic.collective_kind(i) == kind:
        found.add(tuple(traffic.replica_group(i, RANKS)))
  return found


@pytest.mark.parametrize('form', ['experts', 'rows', 'equal'])
def test_one_hop_goes_inside_slices_and_one_across(form):
  """Across slices between devices of one index alone."""
  rows = G * RANKS

  def equal(x_BTD, _):
    layout = dispatch.group(
        jnp.arange(rows), jnp.arange(rows) // RANKS, num_tokens=rows,
        num_groups=G, capacity=RANKS)
    y_PD = all_to_all.on_owning_ranks(
        lambda x_RD, _: jnp.sin(x_RD), x_BTD.reshape(rows, D), layout, RANKS,
        RANKS)
    return y_PD.reshape(x_BTD.shape)

  def loss(x_BTD, group_BT, w_GD):
    if form == 'equal':
      return per_device.batch_local(equal)(x_BTD, ()).sum()
    return jnp.cos(_experts(x_BTD, group_BT, w_GD, form)).sum()

  t = rows if form == 'equal' else T
  args = (jnp.ones((RANKS, t, D)), jnp.zeros((RANKS, t), jnp.int32),
          jnp.ones((G, D)))
  groups = {}
  for name in ('slice', 'slices'):
    with jax.set_mesh(_mesh(name)):
      text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
    groups[name] = _groups(text, 'all-to-all')
  assert groups == {'slice': {(0, 1, 2, 3)}, 'slices': {(0, 1), (0, 2)}}


def _compiled_for_v5e(slices, **sizes):
  """The gradient through experts on v5e, and the locations of its devices."""
  devices = list(tpu_topology.devices('v5e', slices))
  mesh = sharding.make_mesh(data=1, **sizes, devices=devices)
  rows = sharding.batch_sharding(mesh)
  shape = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
      shape, dtype, sharding=rows)

  def loss(x_BTD, w_GD, group_BT):
    return jnp.cos(_experts(x_BTD, group_BT, w_GD, 'experts')).sum()

  n = len(devices)
  args = (shape(n, 32, 128), shape(G, 128), shape(n, 32, dtype=jnp.int32))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().as_text()
  return text, [compiled.location(d) for d in mesh.devices.flat]


@pytest.mark.tpu_compile
def test_a_tpu_moves_the_rows_that_there_are():
  """The program that v5e runs moves rows by ragged all-to-alls."""
  text, _ = _compiled_for_v5e(1, expert=4)
  assert text.count('ragged-all-to-all') >= 4  # there and back, twice


@pytest.mark.tpu_compile
def test_between_slices_of_tpus_rows_cross_from_chip_to_chip():
  """As many all-to-alls over the network as inside, each of two devices."""
  text, locations = _compiled_for_v5e(2, dcn_expert=2, expert=4)
  total = cost.program_cost(text, chips.topology('2xv5e-4'), locations)
  moved = [c for c, _ in total.collectives
           if c.kind == 'ragged-all-to-all' and c.seconds]
  across = [c.group_size for c in moved if c.transfer.dcn_bytes]
  inside = [c.group_size for c in moved if c.transfer.ici_bytes]
  assert len(across) == len(inside) >= 4
  assert set(across) == {2} and set(inside) == {4}
  assert len(moved) == len(across) + len(inside)
