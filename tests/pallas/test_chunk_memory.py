"""chunk_memory: backends against the token-by-token reference, and laws."""

import functools
import inspect
import json

import contract
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mom_jax import pallas
from mom_jax.pallas.chunk_memory import api, cases

# That run on a CPU; the others are interpreted, by files of their own.
RUN = [name for name in api.BACKENDS if name not in ('gpu', 'tpu')]
BACKENDS = [name for name in RUN if name != 'reference']
NAMES = ('q', 'k', 'v', 'log_decay', 'beta')
EXTRA = ('removal_key_RHK', 'value_decay_RHV', 'initial_state_GHKV')
# Rows of an operand that has one entry a row; chunk = 1 hands on states.
BY_ROW = ('removal_key_RHK', 'value_decay_RHV')


def _loss(operands, weights, static, backend):
  """Sum of both outputs with the given weights, and the outputs."""
  rows = [operands.get(name) for name in NAMES]
  o, last = pallas.chunk_memory(
      *rows, **{name: operands.get(name) for name in EXTRA},
      backend=backend, **static
  )
  wide = o.astype(jnp.float32)
  return (wide * weights[0]).sum() + (last * weights[1]).sum(), (o, last)


def _value_and_grads(case, backend, dtype=jnp.float32):
  """Outputs, and gradients by name of operand."""
  args, kw = case.operands(dtype=dtype)
  operands = dict(zip(NAMES, args)) | {name: kw.pop(name) for name in EXTRA}
  operands = {n: x for n, x in operands.items() if x is not None}
  G, (R, H, K), V = len(case.lengths), args[0].shape, case.value
  rng = np.random.default_rng(7)
  weights = (rng.normal(size=(R, H, V)), rng.normal(size=(G, H, K, V)))
  weights = [jnp.asarray(w, jnp.float32) for w in weights]
  run = functools.partial(_loss, weights=weights, static=kw, backend=backend)
  grads, out = jax.jit(jax.grad(run, has_aux=True))(operands)
  return out, grads


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name', cases.CASES)
def test_backend_is_the_reference(name, backend):
  got, got_grads = _value_and_grads(cases.CASES[name], backend)
  want, want_grads = _value_and_grads(cases.CASES[name], 'reference')
  contract.outputs_agree(got[0], want[0], name='o')
  contract.outputs_agree(got[1], want[1], name='state')
  assert got_grads.keys() == want_grads.keys()
  for key, grad in want_grads.items():
    contract.gradients_agree(got_grads[key], grad, name=key)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name', ['delta_head', 'delta_channel_chunk64'])
def test_bfloat16_rows_keep_a_float32_state(name, backend):
  """Outputs come back in v's dtype, the state stays exact to float32."""
  case = cases.CASES[name]
  (o, state), grads = _value_and_grads(case, backend, jnp.bfloat16)
  (want, want_state), want_grads = _value_and_grads(
      case, 'reference', jnp.bfloat16)
  assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  contract.outputs_agree(state, want_state)
  contract.outputs_agree(o, want, 'bfloat16')
  for key, grad in want_grads.items():
    contract.gradients_agree(grads[key], grad, 'bfloat16', key)


def _by_name(decay=None, heads=False):
  """An operation whose arrays are the operands, but for what decays."""
  def op(call, x, z, scale):
    g = x.get(decay)
    if heads:
      g = jnp.broadcast_to(g, z['q'].shape[:3])
    return call(x['q'], x['k'], x['v'], g, x.get('beta'), x['h0'], scale)
  return op


def _unit(op):
  unit = lambda x: x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
  return lambda call, x, z, scale: op(
      call, x | {n: unit(x[n]) for n in 'qk'}, z, scale)


def _normalised(call, x, z, scale):
  """A value channel of ones sums the keys up."""
  ones = jnp.ones_like(x['v'][..., :1])
  state = jnp.concatenate([x['h0'], x['z0'].swapaxes(1, 2).swapaxes(2, 3)], -1)
  o, last = call(x['q'], x['k'], jnp.concatenate([x['v'], ones], -1), None,
                 None, state, scale)
  z_last = last[..., -1:].swapaxes(2, 3).swapaxes(1, 2)
  return o[..., :-1] / (o[..., -1:] + 1e-10), last[..., :-1], z_last


def _hgrn2(call, x, z, scale):
  return call(
      jax.nn.silu(x['q']), jax.nn.sigmoid(-x['f']), x['i'],
      jax.nn.log_sigmoid(x['f']), None, x['h0'], scale)


def _mamba2(call, x, z, scale):
  H = z['x'].shape[2]
  b, c = (jnp.repeat(x[n], H, axis=2) for n in 'BC')
  dt = x['dt'][..., None]
  o, last = call(c, b, x['x'] * dt, x['dt'] * x['A'][None, None], None,
                 x['h0'], scale)
  return o + x['D'][None, None, :, None] * x['x'], last


def _rwkv6(call, x, z, scale):
  o, last = call(x['r'], x['k'], x['v'], x['w'], None, x['h0'], scale,
                 exclusive=True)
  bonus = (x['r'] * x['u'][None, None] * x['k']).sum(-1, keepdims=True)
  return o + bonus * x['v'], last


def _rwkv7(call, x, z, scale):
  """Two rows a token: one erases, under keys that undo the decay, one writes.
  """
  B, T, H, _ = z['r'].shape
  two = lambda first, second: jnp.stack(
      [first, second], 2).reshape(B, 2 * T, H, -1)
  nothing = lambda y: jnp.zeros_like(y)
  o, last = call(
      two(nothing(x['r']), x['r']), two(x['b'], x['k']),
      two(nothing(x['v']), x['v']), two(x['w'], nothing(x['w'])), None, x['h0'],
      scale, removal_key_RHK=two(-x['a'] * jnp.exp(-x['w']), nothing(x['a'])))
  return o[:, 1::2], last


def _gsa(call, x, z, scale):
  """Slots are written under keys, then read as keys."""
  slots, keys = call(x['q'], x['k'], x['s'], None, None, x['hk0'], scale,
                     value_decay_RHV=x['g'])
  o, values = call(jax.nn.softmax(slots), x['s'], x['v'], x['g'], None,
                   x['hv0'], 1.0)
  return o, keys, values


GOLDEN = {
    'gated_delta_rule': _by_name('g'),
    'gated_delta_rule_l2norm': _unit(_by_name('g')),
    'gated_delta_rule_varlen': _unit(_by_name('g')),
    'delta_rule': _by_name(),
    'kda': _by_name('g'),
    'simple_gla': _by_name('g'),
    'gla': _by_name('gk'),
    'linear_attn': _by_name(),
    'linear_attn_normalized': _normalised,
    'retention': _by_name('log_decay_per_head', heads=True),
    'hgrn2': _hgrn2,
    'mamba2_ssd': _mamba2,
    'rwkv6': _rwkv6,
    'rwkv7': _rwkv7,
    'gsa': _gsa,
}


def _slots(bounds, chunk):
  """Slot of each token, sequences padded to whole chunks; group of chunks."""
  counts = -(-np.diff(bounds) // chunk)
  slots = np.concatenate([
      s * chunk + np.arange(n)
      for s, n in zip(np.cumsum(counts) - counts, np.diff(bounds))
  ])
  return slots, np.repeat(np.arange(len(counts)), counts)


@pytest.mark.parametrize('backend', RUN)
@pytest.mark.parametrize('op', GOLDEN)
def test_official_operations(op, backend, golden):
  """Outputs, last states and gradients of the official operations."""
  with np.load(golden(f'op_{op}.npz')) as file:
    z = dict(file)
  meta, chunk = json.loads(str(z['meta_json'])), 16

  def call(q, k, v, g, beta, state, scale, exclusive=False, **extra):
    B, T = q.shape[:2]
    slots, group_N = _slots(z.get('cu_seqlens', np.arange(B + 1) * T), chunk)
    place = lambda a: None if a is None else jnp.zeros(
        (len(group_N) * chunk, *a.shape[2:]), jnp.float32
    ).at[slots].set(a.reshape(-1, *a.shape[2:]))
    o, last = pallas.chunk_memory(
        *map(place, (q, k, v, g, beta)), **jax.tree.map(place, extra),
        group_N=jnp.asarray(group_N), initial_state_GHKV=state, scale=scale,
        chunk=chunk, exclusive=exclusive, backend=backend,
    )
    return o[slots].reshape(B, T, *o.shape[1:]), last

  states = [n for n in ('ht', 'ht0', 'ht1') if n in z]

  def run(x):
    out, *last = GOLDEN[op](call, x, z, meta['scale'])
    total = (out * z['d_out']).sum()
    for name, state in zip(states, last):
      total += (state * z[f'd_{name}']).sum()
    return total, (out, last)

  inputs = {n: jnp.asarray(z[n], jnp.float32) for n in z
            if f'grad/{n}' in z or n == 'log_decay_per_head'}
  grads, (out, last) = jax.jit(jax.grad(run, has_aux=True))(inputs)
  contract.outputs_agree(out, z['out'], name='out')
  for name, state in zip(states, last):
    contract.outputs_agree(state, z[name], name=name)
  for key in inputs:
    if f'grad/{key}' in z:
      contract.gradients_agree(grads[key], z[f'grad/{key}'], name=key)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', cases.KINDS)
def test_one_row_at_a_time(kind, backend):
  """A sequence in chunks = the same in steps of one row that hand on states."""
  T, G = 19, 2
  case = cases.Case(lengths=(T,) * G, chunk=32, unused=0, **cases.KINDS[kind])
  args, kw = case.operands()
  state = kw['initial_state_GHKV']
  want, want_state = pallas.chunk_memory(*args, **kw, backend=backend)
  step = jax.jit(lambda row, extra, state: pallas.chunk_memory(
      *row, **extra, group_N=jnp.arange(G), initial_state_GHKV=state, chunk=1,
      exclusive=case.exclusive, backend=backend))
  rows = np.arange(G) * 32
  outputs = []
  for t in range(T):
    row = [None if a is None else a[rows + t] for a in args]
    extra = {n: kw[n] if kw[n] is None else kw[n][rows + t] for n in BY_ROW}
    o, state = step(row, extra, state)
    outputs.append(o)
  want = want.reshape(G, 32, *want.shape[1:])[:, :T]
  contract.outputs_agree(jnp.stack(outputs, 1), want)
  contract.outputs_agree(state, want_state)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('kind', cases.KINDS)
def test_rows_depend_on_the_past_of_their_group_only(kind, backend):
  """Bit-equal whatever comes later, stands beside or shifts the group."""
  C = 16
  rng = np.random.default_rng(3)
  make = functools.partial(
      cases.Case, chunk=C, unused=0, segments=True, **cases.KINDS[kind])
  def rows_of(case, seed=0):
    """All operands with one entry a row, and the others."""
    args, kw = case.operands(seed=seed)
    return [*args, *(kw[name] for name in BY_ROW)], kw

  (args, kw), t = rows_of(make((53,))), 37
  state = kw['initial_state_GHKV'][0]

  def draw(n):
    """Rows of other groups, of any content."""
    args, kw = rows_of(make((n,)), seed=int(rng.integers(1 << 30)))
    return args, kw['segment_R']

  def read(args, segment, before, after, group):
    """The base group among others; `before`, `after` count their chunks."""
    parts = [draw(before * C), (args, segment), draw(after * C)]
    rows = [
        None if args[i] is None else jnp.concatenate([p[0][i] for p in parts])
        for i in range(len(args))
    ]
    states = jnp.asarray(rng.normal(size=(4, *state.shape)), jnp.float32)
    names = [(group + 1) % 4] * before + [group] * 4 + [(group + 2) % 4] * after
    names += [-1] * (12 - len(names))
    rows = [None if a is None else jnp.pad(
        a, [(0, 12 * C - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in rows]
    segment = jnp.concatenate([p[1] for p in parts])
    segment = jnp.pad(segment, (0, 12 * C - len(segment)))
    states = states.at[group].set(state)
    o, last = run(rows, states, jnp.asarray(names), segment)
    return np.asarray(o)[before * C :][: 4 * C], np.asarray(last[group])

  run = jax.jit(lambda rows, states, group_N, segment_R: pallas.chunk_memory(
      *rows[:5], **dict(zip(BY_ROW, rows[5:])), group_N=group_N,
      initial_state_GHKV=states, segment_R=segment_R, chunk=C,
      exclusive=kw['exclusive'], backend=backend))
  want, want_state = read(args, kw['segment_R'], 0, 0, 0)
  for before, after, group in ((0, 5, 0), (3, 2, 1), (7, 1, 3), (1, 0, 2)):
    got, got_state = read(args, kw['segment_R'], before, after, group)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got_state, want_state)
  # Other rows after t, more of them, of other documents.
  changed, segment = draw(64)
  mix = [
      None if a is None else jnp.concatenate([a[: t + 1], b[t + 1 :]])
      for a, b in zip(args, changed)
  ]
  segment = jnp.concatenate([kw['segment_R'][: t + 1], segment[t + 1 :]])
  got, got_state = read(mix, segment, 0, 0, 0)
  np.testing.assert_array_equal(got[: t + 1], want[: t + 1])
  assert not np.array_equal(got_state, want_state)


@pytest.mark.parametrize('backend', RUN)
@pytest.mark.parametrize(
    'kind', [kind for kind in cases.KINDS if 'additive' not in kind])
def test_packed_documents_are_documents_alone(kind, backend):
  """Boundaries inside and between chunks; padding neither ends nor begins one.

  The group's initial state goes to its first document and to no other.
  """
  C, lengths, padding = 16, (5, 11, 20, 1, 7), (2, 0, 3, 0, 0)
  total = sum(lengths) + sum(padding)
  alone = cases.Case(lengths=lengths, chunk=C, unused=0, **cases.KINDS[kind])
  args, kw = alone.operands()
  state = kw.pop('initial_state_GHKV')
  want, want_state = pallas.chunk_memory(
      *args, **kw, backend=backend,
      initial_state_GHKV=state.at[1:].set(0))
  chunks = [-(-n // C) for n in lengths]
  starts = np.cumsum([0, *chunks[:-1]]) * C
  rows, segment = [], []
  for i, (start, n, pad) in enumerate(zip(starts, lengths, padding)):
    # Padding before a document, as left padding, also inside the group.
    rows += [-1] * pad + list(range(start, start + n))
    segment += [0] * pad + [5 - i] * n
  P = -(-total // C) * C
  rows = np.pad(rows, (0, P - total), constant_values=-1)
  segment = np.pad(segment, (0, P - total))
  pack = lambda a: None if a is None else jnp.where(
      (rows >= 0).reshape(P, *[1] * (a.ndim - 1)), a[rows], 0)
  o, last = pallas.chunk_memory(
      *map(pack, args), **{name: pack(kw[name]) for name in BY_ROW},
      exclusive=alone.exclusive, group_N=jnp.zeros(P // C, jnp.int32),
      chunk=C, backend=backend, initial_state_GHKV=state[:1],
      segment_R=jnp.asarray(segment, jnp.int32))
  contract.outputs_agree(o[rows >= 0], want[rows[rows >= 0]])
  contract.outputs_agree(last[0], want_state[-1])


@pytest.mark.parametrize('backend', RUN)
def test_groups_without_chunks_keep_their_state(backend):
  """And its gradient passes through; without a state they end at zero."""
  args, kw = cases.CASES['delta_head'].operands()
  state = kw.pop('initial_state_GHKV')
  empty = [g for g, n in enumerate(cases.CASES['delta_head'].lengths) if not n]
  run = jax.jit(lambda state: pallas.chunk_memory(
      *args, **kw, initial_state_GHKV=state, backend=backend)[1])
  np.testing.assert_array_equal(run(state)[empty[0]], state[empty[0]])
  grad = jax.jit(jax.grad(lambda s: (3 * run(s)[empty[0]]).sum()))(state)
  np.testing.assert_array_equal(grad[empty[0]], jnp.full_like(state[0], 3))
  last = run(None)
  assert not np.any(last[empty[0]])


@pytest.mark.parametrize('backend', RUN)
def test_unused_chunks_are_zero_whatever_they_hold(backend):
  """Also they write to no group."""
  case = cases.CASES['delta_head']
  args, kw = case.operands()
  unused = np.repeat(np.asarray(kw['group_N']) < 0, case.chunk)
  dirty = [jnp.where(unused.reshape(-1, *[1] * (a.ndim - 1)), -1.0, a)
           for a in args]
  want = pallas.chunk_memory(*args, **kw, backend=backend)
  got = pallas.chunk_memory(*dirty, **kw, backend=backend)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])
  assert not np.any(np.asarray(got[0])[unused])


def test_inside_checkpoint_and_scan():
  """Rematerialised under a scan over layers: the same gradients."""
  args, kw = cases.CASES['delta_head'].operands()
  state = kw.pop('initial_state_GHKV')

  def layer(k, scale):
    o, last = pallas.chunk_memory(
        args[0], k, *args[2:], initial_state_GHKV=state, **kw)
    return k * scale + 0.1 * o[..., : k.shape[-1]], last.sum()

  def loss(k, body):
    k, sums = jax.lax.scan(body, k, jnp.asarray([1.0, 0.5]))
    return (k**2).sum() + sums.sum()

  want = jax.jit(jax.grad(lambda k: loss(k, layer)))(args[1])
  got = jax.jit(jax.grad(lambda k: loss(k, jax.checkpoint(layer))))(args[1])
  assert np.any(want)
  contract.gradients_agree(got, want)


@pytest.mark.parametrize('check_vma', [True, False])
def test_inside_shard_map(check_vma):
  """Rows split over devices, one replicated initial state."""
  D = 2
  mesh = jax.make_mesh(
      (D,), ('data',), axis_types=(jax.sharding.AxisType.Auto,),
      devices=jax.devices()[:D],
  )
  case = cases.CASES['delta_head']
  draws = [case.operands(seed) for seed in range(D)]
  rows = [jnp.stack(a) for a in zip(*(args for args, _ in draws))]
  kw = draws[0][1]
  state = kw.pop('initial_state_GHKV')
  group_N = kw.pop('group_N')
  kw.pop('segment_R')

  def local(rows, state, group_N):
    o, last = pallas.chunk_memory(
        *(a[0] for a in rows), initial_state_GHKV=state, group_N=group_N, **kw)
    return o[None], last[None]

  split, all_ = PartitionSpec('data'), PartitionSpec()
  sharded = jax.shard_map(
      local, mesh=mesh, in_specs=(split, all_, all_), out_specs=split,
      check_vma=check_vma)

  def single(rows, state, group_N):
    out = [local([a[i : i + 1] for a in rows], state, group_N)
           for i in range(D)]
    return [jnp.concatenate(x) for x in zip(*out)]

  def loss(f):
    return lambda *a: sum(jnp.sin(x).sum() for x in f(*a, group_N))

  got = jax.jit(jax.value_and_grad(loss(sharded), (0, 1)))(rows, state)
  want = jax.jit(jax.value_and_grad(loss(single), (0, 1)))(rows, state)
  jax.tree.map(contract.gradients_agree, got, want)


def test_errors_say_what_is_wrong():
  """As a user sees them, without the shape checks of the test run."""
  run = inspect.unwrap(pallas.chunk_memory)
  (q, k, v, g, beta), kw = cases.CASES['delta_head'].operands()
  state = kw.pop('initial_state_GHKV')
  call = lambda *args, **change: run(*args, **{**kw, **change})
  with pytest.raises(ValueError, match=r'q and k must be \[R, H, K\]'):
    call(q, k[:, :, :-1], v, g, beta)
  with pytest.raises(ValueError, match='log_decay must be'):
    call(q, k, v, g[:, :1], beta)
  with pytest.raises(ValueError, match='beta must be'):
    call(q, k, v, g, beta[:, :1])
  with pytest.raises(ValueError, match='chunk=12 must be a power of two'):
    call(q, k, v, g, beta, chunk=12)
  with pytest.raises(ValueError, match='pad each group to whole chunks'):
    call(q, k, v, g, beta, chunk=32)
  with pytest.raises(ValueError, match='pass num_groups'):
    call(q, k, v, g, beta, num_groups=None)
  with pytest.raises(ValueError, match='num_groups=4, but'):
    call(q, k, v, g, beta, initial_state_GHKV=state[:-1])
  with pytest.raises(ValueError, match='initial_state_GHKV must be'):
    call(q, k, v, g, beta, initial_state_GHKV=state[..., :-1])
  with pytest.raises(ValueError, match='segment_R must be'):
    call(q, k, v, g, beta, segment_R=jnp.ones(3, jnp.int32))
  with pytest.raises(ValueError, match='known: auto, gpu, reference, tpu, xla'):
    call(q, k, v, g, beta, backend='cuda')
