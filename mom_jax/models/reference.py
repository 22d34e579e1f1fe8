"""Definitions of the layers, token by token in float32.

They say what a layer computes, and are slow: every expert runs on every token.
The layers equal them in outputs and gradients. The recurrence of a memory is
defined in `pallas/chunk_memory/reference.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from mom_jax import rules
from mom_jax.models import memory_params, mom, moma, token_shift


class Router(NamedTuple):
  """Definition of a router.

  Attributes:
    probs: 'softmax' or 'sigmoid' of the logits.
    selects: 'tokens', top-k of each token; 'experts', of each expert;
      'threshold', experts whose probability is above theirs; 'auxiliary', those
      that the auxiliary routers predict.
    renormalise: the weights of a token add up to 1.
  """

  probs: str
  selects: str
  renormalise: bool = False


# Apart from `routing.ROUTERS`, so that the two can differ.
ROUTERS = {
    'softmax_topk': Router('softmax', 'tokens', renormalise=True),
    'softmax_topk_raw': Router('softmax', 'tokens'),
    'softmax_topk_bias': Router('softmax', 'tokens', renormalise=True),
    'sigmoid_topk': Router('sigmoid', 'tokens', renormalise=True),
    'token_choice': Router('sigmoid', 'tokens'),
    'expert_choice': Router('sigmoid', 'experts'),
    'expert_choice_oracle': Router('sigmoid', 'experts'),
    'threshold': Router('sigmoid', 'threshold'),
    'aux_causal': Router('sigmoid', 'auxiliary'),
}


def moma_ref(
    layer: moma.Moma,
    params: dict[str, Any],
    x_BTD: Float[Array, 'B T D'],
    modality_BT: Int[Array, 'B T'],
    state_E: Float[Array, ' E'] | None = None,
) -> tuple[Float[Array, 'B T D'], Bool[Array, 'B T E']]:
  """Compute a mixture of modality-aware experts.

    y_t = sum_e g_te SwiGLU_e(x_t)  over the experts e of the token's modality

  Args:
    layer: whose fields are the settings.
    params: of the layer.
    modality_BT: modality of each token; -1 is padding, whose output is 0.
    state_E: balance bias or thresholds of a router that has some.
  Returns:
    (y, True where expert e takes token t).
  Raises:
    ValueError: the router has no definition here.
  Source: arXiv 2407.21770, eq. 1, sections 2.2 and 2.4.
  """
  # Level 1: the modality of a token says which experts it may use.
  modality_E = np.repeat(np.arange(len(layer.experts)), layer.experts)
  valid_BT = modality_BT >= 0
  if len(layer.experts) == 1:  # one modality group for all
    modality_BT = jnp.where(valid_BT, 0, -1)
  allowed_BTE = modality_BT[..., None] == modality_E[None, None]
  selected_BTE, weight_BTE = allowed_BTE, allowed_BTE.astype(jnp.float32)
  if max(layer.experts) > 1:
    # Level 2: a choice of these experts, by probabilities s = sigmoid or
    # softmax of x W_g.
    router = _router(layer.router)
    logits_BTE = x_BTD @ params['router']['kernel']
    probs_BTE = _probs(router, logits_BTE, allowed_BTE)
    if router.selects == 'experts':
      selected_BTE = _by_experts(logits_BTE, allowed_BTE, layer)
    elif router.selects == 'auxiliary':
      selected_BTE = allowed_BTE & (_predicted(params, x_BTD, modality_E) > 0.5)
    elif router.selects == 'threshold':
      selected_BTE = allowed_BTE & (probs_BTE > state_E[None, None])
    else:
      selected_BTE = _by_tokens(
          logits_BTE, probs_BTE, allowed_BTE, layer.top_k, state_E)
    # g = s of those that take the token, renormalised if the router does so.
    weight_BTE = _weights(router, logits_BTE, probs_BTE, selected_BTE)

  def token(x_D, weight_E):  # eq. 1
    return sum(
        weight_E[e] * _swiglu(x_D, params['gate_up'][e], params['down'][e])
        for e in range(len(weight_E)))

  y_BTD = jax.vmap(jax.vmap(token))(x_BTD, weight_BTE)
  if layer.shared:
    shared_BTD = _swiglu(
        x_BTD, params['shared_gate_up']['kernel'],
        params['shared_down']['kernel'])
    y_BTD += jnp.where(valid_BT[..., None], shared_BTD, 0)
  return y_BTD, selected_BTE


def _swiglu(x, gate_up_D2F, down_FD):
  gate, up = x @ gate_up_D2F[:, 0], x @ gate_up_D2F[:, 1]
  return (jax.nn.silu(gate) * up) @ down_FD


def _router(name):
  """Return the definition of a router, or raise ValueError."""
  if name not in ROUTERS:
    raise ValueError(
        f'router={name!r} has no definition in mom_jax.models.reference; add'
        ' it to ROUTERS there.'
    )
  return ROUTERS[name]


def _probs(router, logits_BTE, allowed_BTE):
  """Take the sigmoid, or the softmax over the experts that a token may use."""
  if router.probs == 'softmax':
    return _softmax(logits_BTE, allowed_BTE)
  return jnp.where(allowed_BTE, jax.nn.sigmoid(logits_BTE), 0)


def _softmax(logits_BTE, among_BTE):
  return jnp.where(
      among_BTE.any(-1, keepdims=True),
      jax.nn.softmax(logits_BTE, where=among_BTE | ~among_BTE.any(
          -1, keepdims=True)), 0)


def _weights(router, logits_BTE, probs_BTE, selected_BTE):
  """Take the probabilities of a selection, divided by their sum if so defined.

  s / sum of s is the softmax of log s.
  """
  if not router.renormalise:
    return jnp.where(selected_BTE, probs_BTE, 0)
  if router.probs == 'sigmoid':
    logits_BTE = jax.nn.log_sigmoid(logits_BTE)
  return _softmax(logits_BTE, selected_BTE)


def _by_tokens(logits_BTE, probs_BTE, allowed_BTE, top_k, bias_E):
  """Give each token its k best experts, by probability plus balance bias.

  Logits rank as probabilities do, and also where these are equal in float32.
  """
  score_BTE = logits_BTE
  if bias_E is not None:
    score_BTE = probs_BTE + bias_E.reshape(
        (1,) * (probs_BTE.ndim - 1) + (-1,))
  order_BTE = _order(jnp.where(allowed_BTE, score_BTE, -jnp.inf), -1)
  return allowed_BTE & (order_BTE < top_k)


def _by_experts(logits_BTE, allowed_BTE, layer):
  """Give each expert its k best tokens of every pool.

    k = ceil(c b / E_modality) of the b tokens that may use it, at least 1, at
    most b
  """
  pools = len(logits_BTE) if layer.pool == 'sequence' else 1
  split = lambda x_BTE: x_BTE.reshape(pools, -1, x_BTE.shape[-1])
  logits_PNE, allowed_PNE = split(logits_BTE), split(allowed_BTE)
  group_size_E = np.repeat(layer.experts, layer.experts)
  tokens_PE = allowed_PNE.sum(1)
  # A thousandth of a token: 1.1 x 10 tokens are 11, though 1.1 is inexact.
  k_PE = jnp.ceil(layer.capacity * tokens_PE / group_size_E[None] - 1e-3)
  k_PE = jnp.minimum(jnp.maximum(k_PE, 1), tokens_PE)
  order_PNE = _order(jnp.where(allowed_PNE, logits_PNE, -jnp.inf), 1)
  return (allowed_PNE & (order_PNE < k_PE[:, None])).reshape(allowed_BTE.shape)


def _predicted(params, x_BTD, modality_E):
  """Run auxiliary routers: sigmoid(silu(x W_1) W_2), W_1 of the modality."""
  hidden_EDF = params['auxiliary']['hidden']['kernel'][modality_E]
  h_BTEF = jax.nn.silu(jnp.einsum('btd,edf->btef', x_BTD, hidden_EDF))
  return jax.nn.sigmoid(jnp.einsum(
      'btef,fe->bte', h_BTEF, params['auxiliary']['output']))


def _order(x, axis):
  """Rank along an axis: 0 for the largest; of equals the first comes first."""
  return jnp.argsort(jnp.argsort(-x, axis, stable=True), axis)


class Memories(NamedTuple):
  """States of all memories of a layer, [G, ...] each."""

  state_GHKV: jax.Array
  conv_input_GWF: jax.Array  # of the last rows that each took
  before_GD: jax.Array  # the last row that each took
  position_G: jax.Array  # rows of the document that each took


def mom_ref(
    layer: mom.Mom,
    params: dict[str, Any],
    x_TD: Float[Array, 'T D'],
    segment_T: Int[Array, ' T'] | None = None,
    modality_T: Int[Array, ' T'] | None = None,
    bias_M: Float[Array, ' M'] | None = None,
) -> Float[Array, 'T D']:
  """Compute Mixture-of-Memories of one sequence.

    S_t^m = rule(S_{t-1}^m; k_t^m, v_t^m) if m takes t, else S_{t-1}^m
    y_t = (norm(sum_m w_tm q_t^m S_t^m) * gate(x_t)) W_o

  With the gated delta rule, log decay g and update strength beta,

    S' = exp(g_t) S_{t-1};  S_t = S' + beta_t k_t^T (v_t - k_t S')

  `pallas/chunk_memory/reference.py` defines this recurrence and its variants,
  to which `rules` maps the others; a few rules have an `update` of their own.

  Each memory has its own keys, values and gates, x W^m, convolved along the
  tokens that it took. The shared memory takes every token with weight 1, and
  all are empty where a document begins.

  Args:
    layer: whose fields are the settings.
    params: of the layer.
    segment_T, modality_T: as of the layer.
    bias_M: balance bias of a router that has one.
  Raises:
    ValueError: the router has no definition here.
  Source: arXiv 2502.13685, eq. 3 to 8; for the rule see `rules`.
  """
  T = len(x_TD)
  if segment_T is None:
    segment_T = jnp.ones(T, jnp.int32)
  modality_T = jnp.zeros(T, jnp.int32) if modality_T is None else modality_T
  weight_TG, taken_TG = _memories_of_tokens(
      layer, params, x_TD, segment_T > 0, bias_M)            # eq. 3, 4
  empty = _no_memories(layer, params, len(taken_TG[0]), x_TD)

  def token(carry, inputs):
    old, last_D, last_segment = carry
    x_D, weight_G, taken_G, segment, modality = inputs
    begins = (segment > 0) & (segment != last_segment)
    old = jax.tree.map(lambda a, b: jnp.where(begins, a, b), empty, old)
    last_D = jnp.where(begins, 0, last_D)
    row = functools.partial(_row, layer, params, modality, x_D)
    new, o_GHX = jax.vmap(row)(_by_memory(layer, params), old)  # eq. 5, 6, 8
    keep = lambda a, b: jnp.where(
        taken_G.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    o_HX = jnp.tensordot(weight_G, o_GHX, 1)                    # eq. 7
    y_D = _output(layer, params, modality, o_HX, x_D, last_D)
    valid = segment > 0
    carry = (jax.tree.map(keep, new, old), jnp.where(valid, x_D, last_D),
             jnp.where(valid, segment, last_segment))
    return carry, jnp.where(valid, y_D, 0)

  first = (empty, jnp.zeros_like(x_TD[0]), jnp.zeros((), segment_T.dtype))
  _, y_TD = jax.lax.scan(
      token, first, (x_TD, weight_TG, taken_TG, segment_T, modality_T))
  return y_TD


def _memories_of_tokens(layer, params, x_TD, valid_T, bias_M):
  """Route: (weight, taken) of every token and memory, [T, G] each."""
  M = layer.num_memories
  allowed_TM = jnp.broadcast_to(valid_T[:, None], (len(x_TD), M))
  weight_TM = taken_TM = allowed_TM
  if M > 1:
    router = _router(layer.router)
    logits_TM = x_TD @ params['router']['kernel']
    probs_TM = _probs(router, logits_TM, allowed_TM)
    taken_TM = _by_tokens(
        logits_TM, probs_TM, allowed_TM, layer.top_k, bias_M)
    weight_TM = _weights(router, logits_TM, probs_TM, taken_TM)
  add_shared = lambda x_TM: jnp.concatenate(
      [x_TM, valid_T[:, None][:, : int(layer.shared)]], 1)
  return add_shared(weight_TM.astype(jnp.float32)), add_shared(taken_TM)


def _no_memories(layer, params, G, x_TD) -> Memories:
  """Make memories that took nothing."""
  H, U, K, V, n = memory_params.HeadSizes.of(layer)
  state = memory_params.rule_of(layer).state_shape(K, V)
  F = U * K * (1 + n) + H * n * V
  return Memories(
      jnp.zeros((G, H, *state)), jnp.zeros((G, layer.conv_width, F)),
      jnp.zeros((G, x_TD.shape[1])), jnp.zeros(G, jnp.int32))


def _by_memory(layer, params):
  """Broadcast parameters to a leading axis with one entry per memory."""
  G = layer.num_memories + layer.shared
  names = ['key', 'value']
  for name in memory_params.rule_of(layer).gates:
    names += [name] if name in params else [f'{name}_in', f'{name}_out']
  return {name: jnp.broadcast_to(params[name], (G, *params[name].shape[1:]))
          for name in names}


def _row(layer, params, modality, x_D, own, memory: Memories):
  """Let one memory take one token: (the memory after it, the output)."""
  rule, sizes = memory_params.rule_of(layer), memory_params.HeadSizes.of(layer)
  shapes, constants = sizes.row_shapes(rule), mom.only_layer(layer)
  own = own | {'query': params['query']}
  if layer.num_modality_copies:
    own = {name: w[modality] for name, w in own.items()}
  input_of = lambda name: x_D
  shift = token_shift.of_params(rule, params)
  if shift is not None:
    mixed = token_shift.mix(x_D, memory.before_GD, shift)
    input_of = lambda name: mixed[name]

  def gate(name):
    spec = rule.gates[name]
    if name in own:
      g = jnp.tensordot(input_of(spec.input_of or name), own[name], 1)
    else:
      low = jnp.tensordot(input_of(spec.input_of or name), own[f'{name}_in'], 1)
      low = spec.activation(low) if spec.activation else low
      g = jnp.tensordot(low, own[f'{name}_out'], 1)
    return g.reshape(1, *shapes[name])

  u_F = jnp.concatenate([
      jnp.tensordot(input_of(name), own[name], 1).ravel()
      for name in memory_params.QKV])
  window_WF = memory.conv_input_GWF
  if layer.conv_width:
    window_WF = jnp.concatenate([window_WF[1:], u_F[None]])
    u_F = (window_WF * _conv(params, 'conv_{}', layer.conv_width)).sum(0)
    if layer.conv_bias:
      u_F += _conv(params, 'conv_{}_bias', 1)[0]
  columns = np.cumsum([math.prod(shapes[name]) for name in memory_params.QKV])
  q, k, v = (
      (jax.nn.silu(u) if layer.conv_width and name[0] in rule.silu else u
       ).reshape(1, *shapes[name])
      for name, u in zip(memory_params.QKV, jnp.split(u_F, columns[:-1])))
  each = lambda x: jnp.repeat(x, sizes.H // sizes.U, axis=1)
  # S_t and o_t of one row; pallas/chunk_memory/reference.py has the equations.
  o_1HX, state = rules.run(
      rule, each(q), each(k), v, {name: gate(name) for name in rule.gates},
      constants | {name: params[name] for name in rule.constants},
      jnp.ones(1, bool), position_in_memory=memory.position_G[None],
      group_N=jnp.zeros(1, jnp.int32), segment_R=jnp.ones(1, jnp.int32),
      initial_state_GHKV=memory.state_GHKV[None], num_groups=1, chunk=1,
      backend='reference')
  return Memories(
      state[0], window_WF, x_D, memory.position_G + 1), o_1HX[0]


def _conv(params, form, W):
  """Concatenate the taps, or biases, of all columns to [W, F]."""
  return jnp.concatenate([
      params[form.format(name)].reshape(W, -1) for name in memory_params.QKV],
      1)


def _output(layer, params, modality, o_HX, x_D, before_D):
  """Apply norm, output gate and output projection to one token."""
  own = {name: params[name] for name in ('gate', 'gate_in', 'norm', 'output')
         if name in params}
  if layer.num_modality_copies:
    own = jax.tree.map(lambda w: w[modality], own)
  V = memory_params.HeadSizes.of(layer).V
  o_HV, skip_HV = o_HX[:, :V], o_HX[:, V:]
  shift = token_shift.of_params(memory_params.rule_of(layer), params)
  if shift is not None:
    x_D = token_shift.mix(x_D, before_D, shift)['output']
  kind, g_HV = layer.output_gate, 1.0
  if 'gate_in' in own:
    x_D = x_D @ own['gate_in']['kernel']
    x_D = jax.nn.sigmoid(x_D) if kind == 'inner_sigmoid' else x_D
  if 'gate' in own:
    activation = {'silu': jax.nn.silu, 'silu_before_norm': jax.nn.silu,
                  'sigmoid': jax.nn.sigmoid, 'inner_sigmoid': lambda g: g}
    g_HV = activation[kind](jnp.tensordot(x_D, own['gate']['kernel'], 1))
  if kind == 'self_silu':
    o_HV = jax.nn.silu(o_HV)
  elif kind == 'silu_before_norm':
    o_HV, g_HV = o_HV * g_HV, 1.0
  if layer.output_norm == 'group':
    o_HV = o_HV - o_HV.mean(-1, keepdims=True)
  if layer.output_norm != 'none':
    over = (0, 1) if layer.output_norm == 'all' else 1
    o_HV *= jax.lax.rsqrt(
        jnp.square(o_HV).mean(over, keepdims=True) + layer.norm_eps)
    wide = lambda w: w.reshape(-1, V)  # one for all heads, or one for each
    o_HV = o_HV * wide(own['norm']['scale'])
  if 'bias' in own.get('norm', {}):
    o_HV = o_HV + wide(own['norm']['bias'])
  if skip_HV.shape[-1]:
    o_HV = o_HV + skip_HV
  return jnp.tensordot(o_HV * g_HV, own['output']['kernel'], 2)
