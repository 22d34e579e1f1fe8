"""Named programs whose cost on a TPU is counted without one.

A name is op/shape/pass/backend; `*` marks a rival. `case` is what tpu_static.py
calls, in a process of its own for each program and TPU.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np
import rivals

from mom_jax import config, pallas
from mom_jax.models import block
from mom_jax.pallas.chunk_memory import api as memory_api
from mom_jax.pallas.grouped_matmul import api as matmul_api
from mom_jax.pallas.grouped_matmul.tpu import backend as matmul_tpu
from mom_jax.pallas.grouped_matmul.tpu import tiles
from mom_jax.pallas.grouped_swiglu import api as swiglu_api
from mom_jax.pallas.short_conv import api as conv_api
from mom_jax.pallas.short_conv import cases as conv_cases

Shape = jax.ShapeDtypeStruct


class Matmul(NamedTuple):
  """Groups of rows of width D by matrices [D, F]."""

  sizes: tuple[int, ...]
  rows: int
  width: int
  hidden: int


class Gather(NamedTuple):
  """A grouped product of tokens' rows by number, as a memory layer has it.

  Each token takes `top_k` of the memories, at random, and one that all take;
  rows of each memory and sample begin at a multiple of `align`.
  """

  batch: int
  length: int
  memories: int
  top_k: int
  width: int
  hidden: int
  align: int = 128


class Memory(NamedTuple):
  """Whole sequences through heads of D x D, gated delta rule or as said.

  Attributes:
    by: what decays, 'head' or 'key' channel.
    delta: delta rule, else additive write.
    chunk: rows of a chunk in our kernels; 1 has initial states, as decoding.
  """

  batch: int
  length: int
  heads: int
  size: int
  by: str = 'head'
  delta: bool = True
  chunk: int = 128


class Conv(NamedTuple):
  """Queries, keys and values of heads of `head_dim`, and 8 gates, four taps.

  Attributes:
    group: rows that follow each other; no row sees another group's.
  """

  rows: int
  width: int
  head_dim: int
  group: int


class Layer(NamedTuple):
  """The MoM layer of mom_380m: width 1024, 4 heads of 256, 2 of 4 memories.

  Attributes:
    skewed: every token takes memories 0 and 1; else each two at random.
  """

  batch: int
  length: int
  skewed: bool = False


# What is called small compiles quickly: tests hold it to its budget.
MATMULS = {
    'large': Matmul(
        (3000, 1111, 4096, 77, 2500, 3200, 900, 1500), 16384, 2048, 5504),
    'even': Matmul((2048,) * 8, 16384, 2048, 5504),
    'one_takes_all': Matmul((0,) * 5 + (16384, 0, 0), 16384, 2048, 5504),
    'small': Matmul((600, 0, 77, 1, 370), 1280, 512, 1024),
}
GATHERS = {
    'mom_380m': Gather(4, 4096, 4, 2, 1024, 2048),
    'small': Gather(2, 1024, 2, 1, 256, 512),
}
MEMORIES = {
    'h4_d256': Memory(4, 4096, 4, 256),
    'h16_d128': Memory(4, 4096, 16, 128),
    'h4_d256_kda': Memory(4, 4096, 4, 256, by='key', chunk=64),
    'h4_d256_gla': Memory(4, 4096, 4, 256, by='key', delta=False, chunk=64),
    'decode_h4_d256': Memory(128, 1, 4, 256, chunk=1),
    'small': Memory(2, 512, 2, 128),
    'small_kda': Memory(2, 512, 2, 128, by='key', chunk=64),
}
CONVS = {
    'h4_d256': Conv(3 * 16384, 1024, 256, 2048),
    'small': Conv(1024, 256, 128, 256),
}
LAYERS = {
    'even': Layer(4, 4096),
    'one_takes_all': Layer(4, 4096, skewed=True),
}
MEGABLOX_TILES = (512, 1024, 1024)
RECIPE = pathlib.Path(__file__).parents[1] / 'configs' / 'mom_380m.py'


class Program(NamedTuple):
  """One thing to compile.

  Attributes:
    fn: a function of (*floats, *indices).
    floats: shapes.
    indices: arrays of integers; their values decide what is done.
    flops: multiply-adds asked for, times two.
    loops: turns of XLA's loops whose number depends on the indices, a mean.
    decided: `fn` with what routers decide taken from the indices, for `scalars`
      alone; None is `fn`.
  """

  fn: Callable[..., Any]
  floats: tuple[Any, ...]
  indices: tuple[Any, ...]
  flops: float
  loops: float = 1
  decided: Callable[..., Any] | None = None


def names() -> list[str]:
  """All programs, backends and rivals of a case side by side."""
  return [
      *(f'grouped_matmul/{shape}/{what}/{backend}' for shape in MATMULS
        for what in ('forward', 'dx', 'dw') for backend in _matmuls()),
      *(f'gather/{shape}/{what}/{by}' for shape in GATHERS
        for what in ('forward', 'dw') for by in ('tpu', 'xla')),
      *(f'grouped_swiglu/{shape}/{what}/{backend}' for shape in MATMULS
        for what in ('forward', 'both') for backend in _swiglus()),
      *(f'chunk_memory/{shape}/{what}/{backend}' for shape, m in
        MEMORIES.items() for what in ('forward', 'both')[:m.length]
        for backend in _memories(m)),
      *(f'short_conv/{shape}/{what}/{backend}' for shape in CONVS
        for what in ('forward', 'both') for backend in _convs()),
      *(f'mom_layer/{shape}/{what}/tpu' for shape in LAYERS
        for what in ('forward', 'both'))]


def _matmuls():
  ours = {
      name: functools.partial(pallas.grouped_matmul, backend=name)
      for name in matmul_api.BACKENDS if name not in ('gpu', 'reference')}
  return ours | {'megablox *': _megablox, 'ragged_dot *': jax.lax.ragged_dot}


def _megablox(x, w, sizes):
  return gmm(x, w, sizes, x.dtype, MEGABLOX_TILES)


def _megablox_gradient(x, w, dy, sizes):
  return (
      gmm(dy, w, sizes, x.dtype, MEGABLOX_TILES, transpose_rhs=True),
      tgmm(x.T, dy, sizes, x.dtype, MEGABLOX_TILES))


def _swiglus():
  ours = {
      name: functools.partial(pallas.grouped_swiglu, backend=name)
      for name in swiglu_api.BACKENDS if name not in ('gpu', 'reference')}
  return ours | {'two ops': _two_ops}


def _two_ops(x, gate_up, sizes):
  """Compute grouped_swiglu by grouped_matmul, unfused."""
  gate, up = jnp.split(pallas.grouped_matmul(x, gate_up, sizes), 2, 1)
  return jax.nn.silu(gate) * up


def _convs():
  return [name for name in conv_api.BACKENDS if name != 'reference']


def _memories(m):
  ours = {
      name: functools.partial(
          _chunk_memory, name, m.chunk if name == 'tpu' else min(64, m.length))
      for name in memory_api.BACKENDS if name not in ('gpu', 'reference')}
  if m.length > 1 and m.by == 'head' and m.delta:
    ours['chunks by solve *'] = rivals.chunks_by_solve
  return ours


def _chunk_memory(
    backend, chunk, q, k, v, log_decay, beta=None, state=None):
  B, T = q.shape[:2]
  flat = lambda x: None if x is None else x.reshape(B * T, *x.shape[2:])
  o, last = pallas.chunk_memory(
      *map(flat, (q, k, v, log_decay, beta)), num_groups=B, chunk=chunk,
      initial_state_GHKV=state, backend=backend,
      group_N=jnp.repeat(jnp.arange(B), T // chunk))
  o = o.reshape(v.shape)
  return o if state is None else (o, last)


def program(name: str) -> Program:
  op, shape, what, backend = name.split('/')
  build = {'grouped_matmul': _matmul, 'gather': _gather,
           'grouped_swiglu': _swiglu,
           'chunk_memory': _memory, 'short_conv': _conv,
           'mom_layer': _layer}[op]
  return build(shape, what, backend)


def _matmul(shape, what, backend):
  m, run = MATMULS[shape], _matmuls()[backend]
  shaped = lambda *s: Shape(s, jnp.bfloat16)
  x, dy = shaped(m.rows, m.width), shaped(m.rows, m.hidden)
  w = shaped(len(m.sizes), m.width, m.hidden)
  gradient = lambda x, w, dy, s: jax.vjp(lambda x, w: run(x, w, s), x, w)[1](dy)
  if run is _megablox:
    gradient = _megablox_gradient
  fn, floats = {
      'forward': (run, (x, w)),
      'dx': (lambda *args: gradient(*args)[0], (x, w, dy)),
      'dw': (lambda *args: gradient(*args)[1], (x, w, dy)),
  }[what]
  mean_tiles = np.mean([-(-size // 128) for size in m.sizes])
  return Program(
      fn, floats, (np.array(m.sizes, np.int32),),
      2.0 * sum(m.sizes) * m.width * m.hidden, float(mean_tiles))


def _gather(shape, what, by):
  """Gathered inside the kernels, or by XLA before them."""
  m = GATHERS[shape]
  N, rng = m.batch * m.length, np.random.default_rng(0)
  memory_NA = rng.permuted(np.broadcast_to(
      np.arange(m.memories), (N, m.memories)), axis=1)[:, :m.top_k]
  indices, sizes = [], np.zeros(m.memories + 1, np.int32)
  for g in range(m.memories + 1):
    takes_BT = (memory_NA == g).any(1) | (g == m.memories)
    for b, takes_T in enumerate(takes_BT.reshape(m.batch, -1)):
      taken = np.flatnonzero(takes_T) + b * m.length
      indices += [taken, np.full(-len(taken) % m.align, N)]
      sizes[g] += sum(map(len, indices[-2:]))
  row_index = np.concatenate(indices).astype(np.int32)
  shaped = lambda *s: Shape(s, jnp.bfloat16)
  (R, D, F), G = (len(row_index), m.width, m.hidden), len(sizes)

  def fn(x, w_or_dy, row_index, sizes):
    if by == 'xla':
      x, row_index = x.at[row_index].get(mode='clip'), None
    if what == 'forward':
      t = tiles.matmul_tiles(R, D, F, x.dtype)
      return matmul_tpu.matmul(x, w_or_dy, sizes, t, row_index=row_index)
    t = tiles.weight_gradient_tiles(R, D, F, x.dtype)
    return matmul_tpu.weight_gradient(
        x, w_or_dy, sizes, t, row_index=row_index)

  other = shaped(G, D, F) if what == 'forward' else shaped(R, F)
  return Program(
      fn, (shaped(N, D), other), (row_index, sizes), 2.0 * R * D * F)


def _swiglu(shape, what, backend):
  m, run = MATMULS[shape], _swiglus()[backend]
  shaped = lambda *s: Shape(s, jnp.bfloat16)
  x, w = shaped(m.rows, m.width), shaped(len(m.sizes), m.width, 2 * m.hidden)
  fn, floats, flops = run, (x, w), 4.0 * sum(m.sizes) * m.width * m.hidden
  if what == 'both':
    floats, flops = (x, w, shaped(m.rows, m.hidden)), 3 * flops

    def fn(x, w, dh, sizes):
      h, pull = jax.vjp(lambda x, w: run(x, w, sizes), x, w)
      return h, pull(dh)

  mean_tiles = np.mean([-(-size // 128) for size in m.sizes])
  return Program(
      fn, floats, (np.array(m.sizes, np.int32),), flops, float(mean_tiles))


def _memory(shape, what, backend):
  m = MEMORIES[shape]
  run = _memories(m)[backend]
  rows = (m.batch * m.length, m.heads)
  # As projections leave them, heads side by side.
  x = Shape((rows[0], m.heads * m.size), jnp.bfloat16)
  gate = Shape(rows, jnp.float32)
  rates = gate if m.by == 'head' else Shape(x.shape, jnp.float32)
  floats = [x, x, x, rates] + [gate] * m.delta
  split = lambda a: a if a.ndim == 4 else a.reshape(
      m.batch, m.length, m.heads, *[m.size] * (a.shape[1] > m.heads))

  def fn(*args):
    out = run(*map(split, args))
    return out if m.chunk == 1 else out.reshape(x.shape).astype(x.dtype)

  flops = (6.0 if m.delta else 4.0) * np.prod(rows) * m.size**2
  if m.chunk == 1:
    state = Shape((m.batch, m.heads, m.size, m.size), jnp.float32)
    fn, floats = jax.jit(fn, donate_argnums=len(floats)), [*floats, state]
  forward = fn
  if what == 'both':
    floats, flops = [*floats, x], 3 * flops

    def fn(*args):
      out, pull = jax.vjp(forward, *args[:-1])
      return out, pull(args[-1])

  return Program(
      fn, tuple(floats), (), flops,
      m.length / (m.chunk if backend == 'tpu' else 64))


def _conv(shape, what, backend):
  m = CONVS[shape]
  parts = conv_cases.heads(m.width, m.head_dim, gates=8)
  shaped = lambda *s: Shape(s, jnp.bfloat16)
  xs = [shaped(m.rows, sum(p.width for p in ps)) for ps in parts]
  taps = shaped(4, 3 * m.width)
  dys = [shaped(m.rows, p.width) for ps in parts for p in ps]

  def run(q, kvg, taps, reach):
    return pallas.short_conv(
        (q, kvg), taps, None, reach, parts, backend=backend)

  def fn(q, kvg, taps, *rest):
    *dys, reach = rest
    if not dys:
      return run(q, kvg, taps, reach)
    ys, pull = jax.vjp(lambda *floats: run(*floats, reach), q, kvg, taps)
    return ys, pull(tuple(dys))

  reach = np.arange(m.rows, dtype=np.int32) % m.group
  return Program(
      fn, (*xs, taps, *(dys if what == 'both' else [])), (reach,), 0.0)


def _layer(shape, what, backend):
  m = LAYERS[shape]
  made = lambda backend: config.load(RECIPE, [
      'model.mixer.chunk=128', f'model.mixer.backend={backend}']).model
  cfg = made(backend)
  layer, M = block.MIXERS['mom'].make(cfg), cfg.mixer.num_memories
  x = Shape((m.batch, m.length, cfg.width), jnp.bfloat16)
  segment_BT = np.ones(x.shape[:2], np.int32)
  # Of the device at hand, where the backend may not run.
  init = lambda x: nn.meta.unbox(block.MIXERS['mom'].make(made('auto')).init(
      jax.random.key(0), x, None, jnp.asarray(segment_BT)))
  leaves, tree = jax.tree.flatten(jax.eval_shape(init, x))
  rng = np.random.default_rng(0)
  # Scores of the memories, as whole numbers.
  score_BTM = rng.permuted(
      np.broadcast_to(np.arange(M), (*x.shape[:2], M)), axis=2)
  if m.skewed:
    score_BTM = np.broadcast_to(np.arange(M)[::-1], score_BTM.shape)
  score_BTM = np.ascontiguousarray(score_BTM, np.int32)

  def run(x, leaves, segment_BT):
    return layer.apply(
        jax.tree.unflatten(tree, leaves), x, None, segment_BT)[0]

  def fn(x, dy, *rest):
    *leaves, segment_BT, _ = rest
    if what == 'forward':
      return run(x, leaves, segment_BT)
    y, pull = jax.vjp(lambda x, leaves: run(x, leaves, segment_BT), x, leaves)
    return y, pull(dy)

  def decided(*args):
    def given(do, positional, named, context):
      if context.module.name == 'router':
        return args[-1].astype(jnp.float32)
      return do(*positional, **named)
    with nn.intercept_methods(given):
      return fn(*args)

  tokens = m.batch * m.length
  return Program(
      fn, (x, x, *leaves), (segment_BT, score_BTM),
      _layer_flops(cfg, tokens) * (3 if what == 'both' else 1),
      decided=decided)


def _layer_flops(cfg, tokens):
  """Products of a layer, by what is asked for."""
  mixer, D = cfg.mixer, cfg.width
  H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
  rows = mixer.top_k + mixer.shared
  in_memory = D * H * (K + V + 2) + 3 * H * K * V  # gates: decay and beta
  own = D * (H * (K + 2 * V) + mixer.num_memories)
  return 2.0 * tokens * (rows * in_memory + own)


def case(name: str) -> dict[str, Any]:
  """Return the arguments of a compilation by tpu_static.py."""
  p = program(name)
  return dict(
      fn=p.fn, name=name, flops=p.flops,
      args=(*p.floats, *(Shape(i.shape, i.dtype) for i in p.indices)),
      scalars=functools.partial(
          scalars, p.decided or p.fn, p.floats, p.indices))


def scalars(fn, floats, indices) -> dict[str, dict[int, Any]]:
  """Integers that reach the kernels of `fn`, by kernel name and operand.

  Computes all that does not depend on `floats`.
  """
  closed = jax.make_jaxpr(fn)(*floats, *indices)
  found: dict[str, dict[int, Any]] = {}
  values = [None] * len(floats) + [jnp.asarray(i) for i in indices]
  # On the device at hand, not the one that is compiled for.
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    _follow(closed.jaxpr, closed.consts, values, found)
  return found


def _follow(jaxpr, consts, values, found):
  """Values of a jaxpr's results, None for those that are not known."""
  what = ''  # the name of a kernel without one: in every op's name
  known = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, values))
  literal = lambda v: isinstance(v, Literal)
  read = lambda v: v.val if literal(v) else known.get(v)
  for eqn in jaxpr.eqns:
    args = [read(v) for v in eqn.invars]
    inner = next((eqn.params[k] for k in ('jaxpr', 'call_jaxpr', 'fun_jaxpr')
                  if k in eqn.params), None)
    if eqn.primitive.name == 'pallas_call':
      found[eqn.params['name'] or what] = {
          i: np.asarray(a) for i, a in enumerate(args)
          if a is not None and jnp.issubdtype(a.dtype, jnp.integer)}
      results = [None] * len(eqn.outvars)
    elif eqn.primitive.name in ('jit', 'pjit', 'custom_vjp_call', 'remat2',
                                'custom_jvp_call', 'closed_call', 'core_call'):
      body = getattr(inner, 'jaxpr', inner)
      results = _follow(body, getattr(inner, 'consts', ()), args, found)
    elif any(a is None for a in args):
      results = [None] * len(eqn.outvars)
    else:
      results = eqn.primitive.bind(*args, **eqn.params)
      results = results if eqn.primitive.multiple_results else [results]
    known |= dict(zip(eqn.outvars, results))
  return [read(v) for v in jaxpr.outvars]
