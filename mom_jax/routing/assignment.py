"""Inputs, settings and result of a router.

A group is an expert or a memory. In an `Assignment` row r sends token
`token_R[r]` to group `group_R[r]`, whose output counts with `weight_R[r]`:

  y_t = sum over rows r of token t of  weight_r f_{group_r}(x_t)

R is static. A row without a group (-1) is a choice that was not made.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

T = TypeVar('T', bound=type)


def static_fields(*names: str) -> Callable[[T], T]:
  """Make fields of a NamedTuple static under `jit` and other transformations.
  """

  def register(cls: T) -> T:
    arrays = [name for name in cls._fields if name not in names]

    def flatten(value):
      keys = [(jax.tree_util.GetAttrKey(n), getattr(value, n)) for n in arrays]
      return keys, tuple(getattr(value, n) for n in names)

    def unflatten(static, children):
      return cls(**dict(zip(arrays, children)), **dict(zip(names, static)))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls

  return register


class RouterInputs(NamedTuple):
  """Inputs of routers; each router uses those that it needs.

  Attributes:
    logits_BTE: raw router logits, float32.
    allowed_BTE: whether the token may go to group e. A token may use all
      experts of its modality, which are neighbours, or all experts, or, if it
      is padding, none.
    state_E: router state from past steps, or None.
    aux_logits_BTE: logits of auxiliary routers, or None.
  """

  logits_BTE: Float[Array, 'B T E']
  allowed_BTE: Bool[Array, 'B T E']
  state_E: Float[Array, ' E'] | None = None
  aux_logits_BTE: Float[Array, 'B T E'] | None = None


@dataclasses.dataclass(frozen=True)
class RouterSettings:
  """Settings of routers; each router uses those that it has.

  Attributes:
    top_k: experts per token, in token choice.
    capacity: mean experts per token c, in expert choice.
    pool: tokens that compete for an expert: 'sequence'; 'device' and 'global'
      are all rows of the call, which are those of one device or of all.
    experts: number of experts of each modality, side by side; one number, or
      None, where all modalities share all experts.
    update_rate: step of the balance bias, or 1 - decay of the thresholds' mean.
  """

  top_k: int = 1
  capacity: float = 1.0
  pool: str = 'sequence'
  experts: tuple[int, ...] | None = None
  update_rate: float = 0.0


@static_fields('rows_per_token')
class Assignment(NamedTuple):
  """Rows that send tokens to groups, with weights.

  Attributes:
    token_R: index into the flattened [B * T] tokens.
    group_R: group in [0, E), or -1 for a row that no group takes.
    weight_R: factor of the group's output, float32, 0 where group is -1.
    selected_BTE: the same as a mask: whether group e takes the token.
    probs_BTE: router probabilities (softmax or sigmoid of the logits), 0 where
      not allowed, float32; of `from_mask`, the weights of the selection.
    rows_per_token: A where token_R = repeat(arange(B * T), A), else None.
  """

  token_R: Int[Array, ' R']
  group_R: Int[Array, ' R']
  weight_R: Float[Array, ' R']
  selected_BTE: Bool[Array, 'B T E']
  probs_BTE: Float[Array, 'B T E']
  rows_per_token: int | None


class Selection(NamedTuple):
  """Which groups take which token, with which weights.

  Attributes:
    selected_BTE: whether group e takes the token.
    weight_BTE: factor of its output where it does.
  """

  selected_BTE: Bool[Array, 'B T E']
  weight_BTE: Float[Array, 'B T E']


def token_major(
    expert_NA: Int[Array, 'N A'],
    taken_NA: Bool[Array, 'N A'],
    weight_NA: Float[Array, 'N A'],
    probs_BTE: Float[Array, 'B T E'],
) -> Assignment:
  """Build the assignment with A rows per token, in the order of tokens.

  Args:
    expert_NA: experts that may take each token.
    taken_NA: whether they take it.
    weight_NA: their weights if they do.
  """
  N, A = expert_NA.shape
  group_NA = jnp.where(taken_NA, expert_NA, -1).astype(jnp.int32)
  hot_NAE = group_NA[..., None] == jnp.arange(probs_BTE.shape[-1])[None, None]
  return Assignment(
      jnp.repeat(jnp.arange(N), A),
      group_NA.reshape(-1),
      jnp.where(taken_NA, weight_NA, 0).reshape(-1),
      hot_NAE.any(1).reshape(probs_BTE.shape),
      probs_BTE,
      A,
  )


def from_mask(
    forced: Selection,
    allowed_BTE: Bool[Array, 'B T E'],
    experts: tuple[int, ...] | None,
) -> Assignment:
  """Build the assignment of a selection.

  A token has between none and all experts of its modality; A, the rows per
  token, is the largest number of experts of one modality.

  Args:
    experts: as in `RouterSettings`.
  """
  B, T, E = allowed_BTE.shape
  first_N1 = jnp.argmax(allowed_BTE, -1).reshape(B * T, 1)
  expert_NA = first_N1 + jnp.arange(max(experts or (E,)))[None]
  taken_NA = pick(forced.selected_BTE.astype(jnp.int32), expert_NA) > 0
  weight_NA = pick(forced.weight_BTE, expert_NA)
  return token_major(expert_NA, taken_NA, weight_NA, forced.weight_BTE)


def pick(
    x_BTE: jax.Array, expert_NA: Int[Array, 'N A']
) -> jax.Array:
  """Return x of the experts in `expert_NA`, [N, A].

  A masked sum, whose transpose needs no scatter.
  """
  E = x_BTE.shape[-1]
  hot_NAE = expert_NA[..., None] == jnp.arange(E)[None, None]
  return jnp.where(hot_NAE, x_BTE.reshape(-1, 1, E), 0).sum(-1)
