"""Named cases of chunk_memory, for tests and benchmarks."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

DECAYS = ('none', 'head', 'channel')


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes and kinds of operands.

  Attributes:
    lengths: rows of each group, padding not counted; 0 is an empty group.
    decay: 'none', 'head' or 'channel'.
    delta: delta rule, else additive update.
    removal: removed values are looked up under removal keys.
    value_decay: value channels decay, in place of `decay`.
    exclusive: the output of a row excludes the row itself.
    decay_range: log decay is uniform between these.
    segments: rows belong to documents.
    state: there is an initial state.
    unused: unused chunks, one before the first group, the others at the end.
    near_equal_keys: all keys of a head nearly the same.
    beta: a fixed beta; None draws from (0, 1).
  """

  lengths: tuple[int, ...] = (70, 0, 1, 33)
  heads: int = 2
  key: int = 16
  value: int = 24
  chunk: int = 16
  decay: str = 'head'
  delta: bool = True
  removal: bool = False
  value_decay: bool = False
  exclusive: bool = False
  decay_range: tuple[float, float] = (-0.5, 0.0)
  segments: bool = False
  state: bool = True
  unused: int = 2
  near_equal_keys: bool = False
  beta: float | None = None

  def operands(self, seed: int = 0, dtype=jnp.float32) -> tuple[tuple, dict]:
    """Positional and keyword arguments of chunk_memory."""
    rng = np.random.default_rng(seed)
    G, H, K, V, C = (
        len(self.lengths), self.heads, self.key, self.value, self.chunk
    )
    chunks = [-(-length // C) for length in self.lengths]
    group_N = np.repeat(np.arange(G), chunks)
    front = min(self.unused, 1)
    group_N = np.pad(
        group_N, (front, self.unused - front), constant_values=-1
    )
    R = len(group_N) * C
    real_R, segment_R = np.zeros(R, bool), np.zeros(R, np.int32)
    start = front * C
    for length, n in zip(self.lengths, chunks):
      real_R[start : start + length] = True
      # Documents of 1 to 9 rows, numbered from 1; also a row or two of padding
      # between rows, as left-padded samples have.
      steps = rng.random(length) < 0.2
      segment_R[start : start + length] = 1 + np.cumsum(steps)
      start += n * C
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    q, k = unit(rng.normal(size=(2, R, H, K)))
    if self.near_equal_keys:
      k = unit(k[:1] + 1e-3 * rng.normal(size=k.shape))
    v = rng.normal(size=(R, H, V))
    mask = lambda x: np.where(real_R.reshape(R, *[1] * (x.ndim - 1)), x, 0)
    low, high = self.decay_range
    decays = lambda shape: jnp.asarray(
        mask(rng.uniform(low, high, shape)), jnp.float32)
    log_decay = value_decay_RHV = removal_key_RHK = None
    if self.decay != 'none':
      log_decay = decays((R, H) if self.decay == 'head' else (R, H, K))
    beta = None
    if self.delta:
      beta = rng.random((R, H)) if self.beta is None else np.full(
          (R, H), self.beta)
      beta = jnp.asarray(mask(beta), jnp.float32)
    state = rng.normal(size=(G, H, K, V)) if self.state else None
    if self.value_decay:
      value_decay_RHV = decays((R, H, V))
    if self.removal:  # I - k^T e stays a contraction, as all rules keep it
      removal_key_RHK = jnp.asarray(
          rng.random((R, H, K)), jnp.float32) * mask(k)
    return (
        *(jnp.asarray(mask(x), dtype) for x in (q, k, v)), log_decay, beta,
    ), dict(
        group_N=jnp.asarray(group_N, jnp.int32),
        initial_state_GHKV=(
            None if state is None else jnp.asarray(state, jnp.float32)),
        segment_R=jnp.asarray(segment_R) if self.segments else None,
        removal_key_RHK=removal_key_RHK,
        value_decay_RHV=value_decay_RHV,
        exclusive=self.exclusive,
        num_groups=G,
        chunk=C,
    )


# Every variant of the recurrence.
KINDS = {
    **{
        f'{rule}_{decay}': dict(decay=decay, delta=rule == 'delta')
        for rule in ('additive', 'delta')
        for decay in DECAYS
    },
    'removal_channel': dict(decay='channel', delta=False, removal=True),
    'exclusive_channel': dict(decay='channel', delta=False, exclusive=True),
    'exclusive_delta': dict(decay='none', delta=True, exclusive=True),
    'value_decay': dict(decay='none', delta=False, value_decay=True),
    'exclusive_value_decay': dict(
        decay='none', delta=False, value_decay=True, exclusive=True),
}

CASES = {
    **{name: Case(**kind) for name, kind in KINDS.items()},
    **{
        f'{name}_segments': Case(**kind, segments=True)
        for name, kind in KINDS.items()
    },
    **{
        f'{name}_chunk64': Case(**kind, chunk=64, lengths=(130, 64, 1), heads=1)
        for name, kind in KINDS.items()
    },
    **{
        f'{name}_chunk1': Case(**kind, chunk=1, lengths=(1, 3, 0, 1))
        for name, kind in KINDS.items()
    },
    'no_state': Case(state=False, unused=0),
    'many_groups': Case(lengths=(5, 0, 17, 1, 2, 16, 31, 3) * 4, heads=1),
    'beta_0': Case(beta=0.0),
    'beta_1': Case(beta=1.0),
    'near_equal_keys': Case(
        chunk=64, lengths=(128,), near_equal_keys=True, beta=1.0,
        decay_range=(-1e-3, 0.0)),
    'near_equal_keys_no_decay': Case(
        chunk=64, lengths=(128,), near_equal_keys=True, beta=1.0,
        decay='none'),
    **{
        f'{name}_{decay}': Case(
            chunk=64, lengths=(128, 40), decay=decay, delta=delta,
            decay_range=span)
        for name, span in (
            ('decay_0', (0.0, 0.0)), ('decay_20', (-20.0, -20.0)),
            ('decay_0_to_20', (-20.0, 0.0)))
        for decay in ('head', 'channel')
        for delta in (True,)
    },
    'additive_decay_0_to_20': Case(
        chunk=64, lengths=(128, 40), **KINDS['additive_channel'],
        decay_range=(-20.0, 0.0)),
    'value_decay_0_to_20': Case(
        chunk=64, lengths=(128, 40), **KINDS['value_decay'],
        decay_range=(-20.0, 0.0)),
    'removal_decay_0_to_20': Case(
        chunk=64, lengths=(128, 40), **KINDS['removal_channel'],
        decay_range=(-20.0, 0.0)),
}
