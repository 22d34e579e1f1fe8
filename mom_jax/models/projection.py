"""Queries, keys, values and gates of rows: projections and short convolution.

Rows lie memory by memory, so that each projection of a layer is one grouped
matmul for all memories. Queries, keys and values then go through a causal
convolution along their own memory's rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import pallas, rules
from mom_jax.models import history, memory_params, token_shift
from mom_jax.models.memory_params import QKV
from mom_jax.parallel import all_to_all
from mom_jax.routing import dispatch


@dataclasses.dataclass(frozen=True)
class MemoryRows:
  """Rows grouped by memory, and which matrix each is multiplied by.

  Attributes:
    dispatched: where the rows lie, on the ranks that own their memories.
    weight_R: of each row in its token's sum.
    shape: (B, T) of the tokens.
    segment_P: document of each row, 0 for none.
    num_local_memories: memories on this device, the shared one included; groups
      are memory * B + sample.
    modality_N, modality_P: modality of each token and row, -1 for none; None
      where all modalities share the projections.
  """

  dispatched: all_to_all.RowsOnRanks
  weight_R: jax.Array
  shape: tuple[int, int]
  segment_P: jax.Array
  num_local_memories: int
  modality_N: jax.Array | None
  modality_P: jax.Array | None

  @property
  def layout(self) -> dispatch.Layout:
    """Layout of the rows on this device."""
    return self.dispatched.layout

  @property
  def is_row_P(self) -> jax.Array:
    """Positions that hold a row."""
    return self.layout.row_P < self.layout.token_R.shape[0]

  @property
  def positions_M(self) -> jax.Array:
    """Positions of each memory, padding included."""
    used = (self.layout.group_P >= 0).sum(dtype=jnp.int32)
    samples = len(self.layout.start_G) // self.num_local_memories
    return jnp.diff(jnp.append(self.layout.start_G[::samples], used))

  def combine(self, o_PHX: jax.Array) -> jax.Array:
    """Sum the weighted outputs of each token's rows: [B, T, H, X]."""
    o_NX = self.dispatched.ungroup(
        o_PHX.reshape(len(o_PHX), -1), self.weight_R)
    return o_NX.reshape(*self.shape, *o_PHX.shape[1:])

  def token_matmul(
      self, x_ND: jax.Array, w_SDX: jax.Array
  ) -> jax.Array:
    """Multiply tokens by the one matrix, or that of their modality."""
    return _modality_matmul(self.modality_N, x_ND, w_SDX)

  def row_matmul(self, x_PD: jax.Array, w_SDX: jax.Array) -> jax.Array:
    """Multiply rows by the one matrix, or that of their modality."""
    return _modality_matmul(self.modality_P, x_PD, w_SDX)

  def memory_matmul(self, x_PD: jax.Array, w_GDX: jax.Array) -> jax.Array:
    """Multiply rows by the matrix of their memory, or of memory and modality.
    """
    if self.modality_P is None:
      return pallas.grouped_matmul(x_PD, w_GDX, self.positions_M)
    samples = len(self.layout.start_G) // self.num_local_memories
    copies = len(w_GDX) // self.num_local_memories
    matrix_P = self.layout.group_P // samples * copies + self.modality_P
    return dispatch.matmul(
        x_PD, w_GDX, jnp.where(self.modality_P < 0, -1, matrix_P))

  def gather_memory_matmul(
      self, x_ND: jax.Array, w_GDX: jax.Array
  ) -> jax.Array:
    """Gather the tokens' rows for `memory_matmul`; padding may be anything."""
    if self.modality_P is None:
      return dispatch.gather_matmul(
          self.dispatched.send(x_ND), w_GDX, self.positions_M, self.layout)
    return self.memory_matmul(self.dispatched.gather(x_ND, zeros=False), w_GDX)


def _modality_matmul(modality_R, x_RD, w_SDX):
  """Multiply x by w, or by its modality's matrix; 0 where that is -1."""
  if modality_R is None:
    return x_RD @ w_SDX[0]
  return dispatch.matmul(x_RD, w_SDX, modality_R)


class NamedColumns(NamedTuple):
  """Results of projections along the last axis, in the order of their names."""

  names: tuple[str, ...]
  x_PX: jax.Array


class Projected(NamedTuple):
  """Results of the projections before the convolution.

  Attributes:
    columns: of every projection, once.
    x_PD: the rows, if the token shift of later ones needs them.
  """

  columns: tuple[NamedColumns, ...]
  x_PD: jax.Array | None


class UpdateInputs(NamedTuple):
  """Queries, keys, values and gates that a rule gets.

  Attributes:
    q_PHK, k_PHnK, v_PHnV: after the convolution; n keys and values per row.
    gates: float32, by the rule's names.
    conv_input_PF: input of the convolution, if later rows need its last ones.
  """

  q_PHK: jax.Array
  k_PHnK: jax.Array
  v_PHnV: jax.Array
  gates: dict[str, jax.Array]
  conv_input_PF: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Projections:
  """The projections of a layer: from rows to the inputs of the update.

  Attributes:
    rule: of the update.
    sizes: of the heads on this device.
    widths: columns of each projection's (first) matrix by name.
    per_memory: each memory has its own projections.
    weights, matrices: parameters, and the same concatenated.
  """

  rule: rules.Rule
  sizes: memory_params.HeadSizes
  widths: dict[str, int]
  per_memory: bool
  weights: memory_params.Weights
  matrices: memory_params.Matrices

  @classmethod
  def of(
      cls, settings: memory_params.Settings, weights: memory_params.Weights
  ) -> Projections:
    """Make the projections with these parameters."""
    D = weights.query_SDUK.shape[1]
    rule = memory_params.rule_of(settings)
    sizes = memory_params.HeadSizes.of(settings).here(weights)
    low = memory_params.ranks(settings, D)
    widths = {name: low.get(name, math.prod(shape))
              for name, shape in sizes.row_shapes(rule).items()}
    return cls(rule, sizes, widths, not settings.single_kv_proj, weights,
               memory_params.concatenated(rule, weights))

  def project(
      self, rows: MemoryRows, x_ND: jax.Array, past: history.Past
  ) -> Projected:
    """Project the rows (arXiv 2502.13685, eq. 5)."""
    if self.weights.shift is not None:
      return self._project_shifted(rows, x_ND, past)
    _, *names = self.widths
    # `update_inputs` makes zeros of padding, whose gates the rule ignores.
    gather = functools.partial(rows.dispatched.gather, zeros=False)
    query_PX = gather(rows.token_matmul(x_ND, self.matrices.query_SDX))
    if self.per_memory:
      rest_PX = rows.gather_memory_matmul(x_ND, self.matrices.memory_GDX)
    else:  # project tokens, then take rows
      rest_PX = gather(rows.token_matmul(x_ND, self.matrices.memory_GDX))
    return Projected(
        (NamedColumns(('query',), query_PX),
         NamedColumns(tuple(names), rest_PX)), None)

  def _project_shifted(self, rows, x_ND, past) -> Projected:
    """Do the same where each projection gets its own mixture of two rows."""
    _, *names = self.widths
    x_PD = rows.dispatched.gather(x_ND)
    mixed = token_shift.mix(
        x_PD, past.before(x_PD, 'before_BG1D'), self.weights.shift)
    columns = {
        'query': rows.row_matmul(mixed['query'], self.matrices.query_SDX)}
    matrices = _split_columns(self.matrices.memory_GDX, names, self.widths)
    for name, w_GDX in matrices.items():
      gate = self.rule.gates.get(name)
      source = gate.input_of if gate and gate.input_of else name
      columns[name] = self._matmul(rows, mixed[source], w_GDX)
    return Projected(
        tuple(NamedColumns((name,), x) for name, x in columns.items()), x_PD)

  def update_inputs(
      self, rows: MemoryRows, projected: Projected, past: history.Past
  ) -> UpdateInputs:
    """Convolve, apply SiLU, l2-normalise heads; finish the gates."""
    columns, conv_WF, u_PF = projected.columns, self.matrices.conv_WF, None
    if not past.is_empty:
      columns, u_PF = self._convolved(columns, past)
      conv_WF = None
    made = pallas.short_conv(
        tuple(part.x_PX for part in columns), conv_WF, self.matrices.conv_F,
        jnp.where(rows.is_row_P, past.position_in_memory, -1),
        tuple(tuple(map(self._part, part.names)) for part in columns))
    made = dict(zip((name for part in columns for name in part.names), made))
    dtype, shapes = self.weights.query_SDUK.dtype, self.sizes.row_shapes(
        self.rule)
    q, k, v = (made[name].astype(dtype).reshape(-1, *shapes[name])
               for name in QKV)
    H, U = self.sizes.H, self.sizes.U
    each = lambda x: x if U == H else jnp.repeat(x, H // U, axis=1)
    return UpdateInputs(
        each(q), each(k), v, self._gates(rows, made, shapes), u_PF)

  def _part(self, name) -> pallas.Part:
    """Name the steps of the short convolution for a projection's columns."""
    width = self.widths[name]
    if name not in QKV:
      return pallas.Part(width, conv=False)
    return pallas.Part(
        width,
        silu=bool(self.weights.conv) and name[0] in self.rule.silu,
        l2_dim=self.sizes.K if name[0] in self.rule.l2_normalised else 0)

  def _convolved(self, columns, past):
    """Convolve with rows before these: (columns by name, the input)."""
    apart = {}
    for part in columns:
      apart |= _split_columns(part.x_PX, part.names, self.widths)
    c_PF = u_PF = jnp.concatenate([apart[name] for name in QKV], 1)
    if self.matrices.conv_WF is not None:
      c_PF = past.convolve(
          u_PF, self.matrices.conv_WF.astype(jnp.float32), 'window_BGWF')
    apart |= _split_columns(c_PF, QKV, self.widths)
    return tuple(NamedColumns((name,), x) for name, x in apart.items()), u_PF

  def _gates(self, rows, made, shapes):
    """Compute the rule's gates [P, *shape], float32, by name."""
    gates = {}
    for name, gate in self.rule.gates.items():
      x_PX = made[name]
      if name in self.matrices.second_GRX:
        inner_PR = gate.activation(x_PX) if gate.activation else x_PX
        x_PX = self._matmul(rows, inner_PR, self.matrices.second_GRX[name])
      gates[name] = x_PX.astype(jnp.float32).reshape(-1, *shapes[name])
    return gates

  def _matmul(self, rows, x_PD, w_GDX):
    if self.per_memory:
      return rows.memory_matmul(x_PD, w_GDX)
    return rows.row_matmul(x_PD, w_GDX)


def _split_columns(x, names, widths):
  """Split the columns along the last axis by name."""
  starts = np.cumsum([widths[name] for name in names])[:-1]
  return dict(zip(names, jnp.split(x, starts, axis=-1)))
