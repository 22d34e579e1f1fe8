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

BACKENDS = [name for name in api.BACKENDS if name != 'reference']
NAMES = ('q', 'k', 'v', 'log_decay', 'beta', 'initial_state')


def _loss(operands, weights, static, backend):
  """Sum of both outputs with the given weights, and the outputs."""
  *rows, state = operands
  o, last = pallas.chunk_memory(
      *rows, initial_state_GHKV=state, backend=backend, **static
  )
  wide = o.astype(jnp.float32)
  return (wide * weights[0]).sum() + (last * weights[1]).sum(), (o, last)


def _value_and_grads(case, backend, dtype=jnp.float32):
  """Outputs, and gradients by name of operand."""
  args, kw = case.operands(dtype=dtype)
  state = kw.pop('initial_state_GHKV')
  G, (R, H, K), V = len(case.lengths), args[0].shape, case.value
  rng = np.random.default_rng(7)
  weights = (rng.normal(size=(R, H, V)), rng.normal(size=(G, H, K, V)))
  weights = [jnp.asarray(w, jnp.float32) for w in weights]
  run = functools.partial(_loss, weights=weights, static=kw, backend=backend)
  grads, out = jax.jit(jax.grad(run, has_aux=True))((*args, state))
  return out, {n: g for n, g in zip(NAMES, grads) if g is not None}


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


GOLDEN = {
    'gated_delta_rule': 'g', 'gated_delta_rule_l2norm': 'g',
    'delta_rule': None, 'kda': 'g', 'simple_gla': 'g', 'gla': 'gk',
    'linear_attn': None, 'retention': 'log_decay_per_head',
    'gated_delta_rule_varlen': 'g',
}


@pytest.mark.parametrize('backend', api.BACKENDS)
@pytest.mark.parametrize('op', GOLDEN)
def test_official_operations(op, backend, golden):
  """Outputs, last states and gradients of the official operations."""
  with np.load(golden / f'op_{op}.npz') as file:
    z = dict(file)
  meta, chunk = json.loads(str(z['meta_json'])), 16
  B, T, H, _ = z['q'].shape
  bounds = z.get('cu_seqlens', np.arange(B + 1) * T)
  counts = -(-np.diff(bounds) // chunk)
  # Slot of each token: sequences padded to whole chunks.
  slots = np.concatenate([
      s * chunk + np.arange(n)
      for s, n in zip(np.cumsum(counts) - counts, np.diff(bounds))
  ])
  place = lambda x: jnp.zeros(
      (counts.sum() * chunk, *x.shape[2:]), jnp.float32
  ).at[slots].set(x.reshape(-1, *x.shape[2:]))
  unit = lambda x: x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)

  def run(x):
    q, k = (unit(x[n]) if meta.get('l2norm') else x[n] for n in 'qk')
    g = GOLDEN[op] and x[GOLDEN[op]]
    if op == 'retention':
      g = jnp.broadcast_to(g, (B, T, H))
    rows = (
        None if a is None else place(a)
        for a in (q, k, x['v'], g, x.get('beta'))
    )
    o, last = pallas.chunk_memory(
        *rows, group_N=jnp.asarray(np.repeat(np.arange(len(counts)), counts)),
        initial_state_GHKV=x['h0'], scale=meta['scale'], chunk=chunk,
        backend=backend,
    )
    out = o[slots].reshape(z['out'].shape)
    return (out * z['d_out']).sum() + (last * z['d_ht']).sum(), (out, last)

  inputs = {n: jnp.asarray(z[n]) for n in (
      'q', 'k', 'v', 'g', 'gk', 'beta', 'h0', 'log_decay_per_head') if n in z}
  grads, (out, last) = jax.jit(jax.grad(run, has_aux=True))(inputs)
  contract.outputs_agree(out, z['out'], name='out')
  contract.outputs_agree(last, z['ht'], name='ht')
  for key in inputs:
    if f'grad/{key}' in z:
      contract.gradients_agree(grads[key], z[f'grad/{key}'], name=key)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('decay', cases.DECAYS)
@pytest.mark.parametrize('delta', [False, True])
def test_one_row_at_a_time(delta, decay, backend):
  """A sequence in chunks = the same in steps of one row that hand on states."""
  T, G = 19, 2
  case = cases.Case(
      lengths=(T,) * G, chunk=32, decay=decay, delta=delta, unused=0)
  args, kw = case.operands()
  state = kw['initial_state_GHKV']
  want, want_state = pallas.chunk_memory(*args, **kw, backend=backend)
  step = jax.jit(lambda row, state: pallas.chunk_memory(
      *row, group_N=jnp.arange(G), initial_state_GHKV=state, chunk=1,
      backend=backend))
  rows = np.arange(G) * 32
  outputs = []
  for t in range(T):
    row = [None if a is None else a[rows + t] for a in args]
    o, state = step(row, state)
    outputs.append(o)
  want = want.reshape(G, 32, *want.shape[1:])[:, :T]
  contract.outputs_agree(jnp.stack(outputs, 1), want)
  contract.outputs_agree(state, want_state)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('decay', cases.DECAYS)
@pytest.mark.parametrize('delta', [False, True])
def test_rows_depend_on_the_past_of_their_group_only(delta, decay, backend):
  """Bit-equal whatever comes later, stands beside or shifts the group."""
  C = 16
  rng = np.random.default_rng(3)
  base = cases.Case(
      lengths=(53,), chunk=C, decay=decay, delta=delta, unused=0, heads=2,
      segments=True)
  (args, kw), t = base.operands(), 37
  state = kw['initial_state_GHKV'][0]

  def draw(n):
    """Rows of other groups, of any content."""
    other = cases.Case(
        lengths=(n,), chunk=C, decay=decay, delta=delta, unused=0,
        segments=True)
    args, kw = other.operands(seed=int(rng.integers(1 << 30)))
    return args, kw['segment_R']

  def read(args, segment, before, after, group):
    """The base group among others; `before`, `after` count their chunks."""
    parts = [draw(before * C), (args, segment), draw(after * C)]
    rows = [
        None if args[i] is None else jnp.concatenate([p[0][i] for p in parts])
        for i in range(5)
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
      *rows, group_N=group_N, initial_state_GHKV=states, segment_R=segment_R,
      chunk=C, backend=backend))
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


@pytest.mark.parametrize('backend', api.BACKENDS)
@pytest.mark.parametrize('decay', cases.DECAYS)
def test_packed_documents_are_documents_alone(decay, backend):
  """Boundaries inside and between chunks; padding neither ends nor begins one.

  The group's initial state goes to its first document and to no other.
  """
  C, lengths, padding = 16, (5, 11, 20, 1, 7), (2, 0, 3, 0, 0)
  total = sum(lengths) + sum(padding)
  alone = cases.Case(lengths=lengths, chunk=C, decay=decay, unused=0)
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
  packed = [
      None if a is None
      else jnp.where((rows >= 0).reshape(P, *[1] * (a.ndim - 1)), a[rows], 0)
      for a in args
  ]
  o, last = pallas.chunk_memory(
      *packed, group_N=jnp.zeros(P // C, jnp.int32), chunk=C, backend=backend,
      initial_state_GHKV=state[:1], segment_R=jnp.asarray(segment, jnp.int32))
  contract.outputs_agree(o[rows >= 0], want[rows[rows >= 0]])
  contract.outputs_agree(last[0], want_state[-1])


@pytest.mark.parametrize('backend', api.BACKENDS)
def test_groups_without_chunks_keep_their_state(backend):
  """And its gradient passes through; without a state they end at zero."""
  args, kw = cases.CASES['delta_head'].operands()
  state = kw.pop('initial_state_GHKV')
  empty = [g for g, n in enumerate(cases.CASES['delta_head'].lengths) if not n]
  run = lambda state: pallas.chunk_memory(
      *args, **kw, initial_state_GHKV=state, backend=backend)[1]
  np.testing.assert_array_equal(run(state)[empty[0]], state[empty[0]])
  grad = jax.grad(lambda s: (3 * run(s)[empty[0]]).sum())(state)
  np.testing.assert_array_equal(grad[empty[0]], jnp.full_like(state[0], 3))
  _, last = pallas.chunk_memory(*args, **kw, backend=backend)
  assert not np.any(last[empty[0]])


@pytest.mark.parametrize('backend', api.BACKENDS)
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
  with pytest.raises(ValueError, match='known: auto, reference, xla'):
    call(q, k, v, g, beta, backend='cuda')
