"""Floating-point operations of a model, to compare with a device's peak.

A multiply-add is two operations. Counted are the products that the model
defines: no recomputed activations, no padding and nothing elementwise (norms,
gates, softmax, rotary, the short convolution). Modality-specific projections
cost a token no more than shared ones.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax

from mom_jax import config, routing
from mom_jax.models import lm, memory_params, mod, outputs, token_shift


def train_flops_per_token(cfg: config.Config) -> float:
  """Count those of a training step: forward, and twice as much backward."""
  return 3 * forward_flops_per_token(cfg)


def forward_flops_per_token(cfg: config.Config) -> float:
  """Average over the tokens of a row of `data.seq_len` that is one document.

  Packed documents are shorter, so attention then spends less than this.
  """
  model = cfg.model
  mixers = {
      'mom': lambda T: _mom(model.width, model.mixer),
      'attention': lambda T: _attention(model.width, model.attention, T),
  }
  channels = {
      'mlp': lambda: 2 * 3 * model.width * model.mlp.hidden,
      'shift_mlp': lambda: 2 * 2 * model.width * model.mlp.hidden,
      'none': lambda: 0,
      'moma': lambda: _moma(model.width, model.moma),
  }
  blocks, T = 0.0, cfg.data.seq_len
  for (mixer, channel), is_mod in zip(model.unit, model.mod_blocks):
    if is_mod:
      kept = mod.max_picked(model.mod.capacity, T)
      block = kept / T * (mixers[mixer](kept) + channels[channel]())
      blocks += block + _mod(model)
    else:
      blocks += mixers[mixer](T) + channels[channel]()
  return float(model.repeats * blocks + 2 * model.width * model.vocab_size)


def _mod(model: config.Model) -> int:
  """Count the router that picks tokens, and an auxiliary one if that picks."""
  D = model.width
  auxiliary = routing.get(model.mod.router).needs_aux_logits
  return 2 * (D + auxiliary * (D + 1) * (D // 2))


def _mom(D: int, mixer: config.Mixer) -> int:
  """Count projections, and the recurrence in its token-by-token form.

  A row costs each head `Rule.cost`: most rules 2 K V for the update k^T u and
  2 K V for the output q S, and the delta rules 2 K V for k S. The chunked form
  spends more on matrix units and less time.
  """
  H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
  rule, n = memory_params.rule_of(mixer), mixer.num_householder
  rows = mixer.top_k + mixer.shared
  G, ranks = mixer.key_heads or H, memory_params.ranks(mixer, D)
  own, second = n * (G * K + H * V), 0  # keys, values, gates
  query = G * K
  for name, gate in rule.gates.items():
    out = math.prod((H * n if gate.per_update else H, *gate.size(K, V)))
    rank = ranks.get(name, 0)
    own += rank or out
    second += rank * out
  each = 1 if mixer.single_kv_proj else rows
  router = mixer.num_memories if mixer.num_memories > 1 else 0
  once = D * (H * V + router)
  if mixer.output_gate not in ('none', 'self_silu'):
    rank = mixer.gate_rank
    once += rank * (D + H * V) if rank else D * H * V
  if rule.shift:  # projections are of rows, queries too, each its own mixture
    each, own = rows, own + query
    once += (rows + 1) * token_shift.macs(rule, D)
  else:
    once += D * query
  projections = once + each * (D * own + second)
  return 2 * (projections + rows * n * H * rule.cost(K, V))


def _attention(D: int, attention: config.Attention, T: int) -> float:
  """Count projections, and products with the tokens that each token sees."""
  H, G, K = attention.num_heads, attention.num_kv_heads, attention.head_dim
  w = min(attention.window or T, T)
  seen = (w * (w + 1) / 2 + (T - w) * w) / T
  return 2 * D * K * (2 * H + 2 * G) + 2 * 2 * H * K * seen


def _moma(D: int, moma: config.Moma) -> float:
  """Count the experts that take a token, on average, and the routers."""
  router = sum(moma.experts) if max(moma.experts) > 1 else 0
  if router and routing.get(moma.router).needs_aux_logits:
    router += (D + router) / 2
  experts = experts_per_token(moma) + moma.shared
  return 2 * D * (router + experts * 3 * moma.hidden)


def count_params(cfg: config.Config) -> tuple[int, int]:
  """Count (total, active) parameters, without router state.

  Active parameters are those that one token touches: top_k memories plus the
  shared one, top_k experts (`capacity`, on average, where experts choose
  tokens), one modality's copy of modality-specific weights, and all the rest,
  embeddings included.
  """
  boxed = jax.eval_shape(
      functools.partial(lm.init_params, cfg), jax.random.key(0))
  mixer, moma = cfg.model.mixer, cfg.model.moma
  total, active = 0, 0.0
  flat, _ = jax.tree_util.tree_flatten_with_path(
      boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  for path, leaf in flat:
    if path[-1].key in routing.STATE_NAMES:
      continue
    size = math.prod(leaf.value.shape)
    total += size
    if 'memory' in leaf.names and not mixer.single_kv_proj:
      size *= (mixer.top_k + mixer.shared) / (mixer.num_memories + mixer.shared)
    if 'expert' in leaf.names:
      size *= experts_per_token(moma) / sum(moma.experts)
    if path[0].key == 'units' and path[2].key != 'mod':
      block_ = outputs.block_index(path[1].key)
      if cfg.model.mod_blocks[block_]:
        size *= cfg.model.mod.capacity
    if 'modality' in leaf.names:
      size /= leaf.value.shape[leaf.names.index('modality')]
    active += size
  return total, round(active)


def experts_per_token(moma: config.Moma) -> float:
  """Return the mean number of routed experts that take a token."""
  if max(moma.experts) == 1:
    return 1.0
  if routing.get(moma.router).exact_k:
    return float(moma.top_k)
  return moma.capacity
