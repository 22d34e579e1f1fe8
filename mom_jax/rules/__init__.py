"""Memory-update rules as values.

A `Rule` declares what a memory needs besides queries, keys and values: learned
constants of the layer and gates per token (projections of the layer's input).
It maps them to the operands of `pallas.chunk_memory`. A layer makes the
parameters, and `run` applies the rule to grouped rows. A new rule is a section
in one of these files and a line in `RULES`.

Shapes: R rows, H heads, K and V the key and value sizes of a head, D the width
of a layer.
"""

from __future__ import annotations

from mom_jax.rules import additive, delta, online, rotary, rwkv, slots
from mom_jax.rules.features import FEATURE_MAPS, normalised, with_features
from mom_jax.rules.rule import (
    Constant,
    Gate,
    Operands,
    Rule,
    layer_values,
    run,
)

__all__ = [
    'Constant', 'FEATURE_MAPS', 'Gate', 'Operands', 'RULES', 'Rule', 'get',
    'layer_values', 'rotary', 'run',
]

RULES = {
    'linear': additive.LINEAR,
    'based': normalised(
        with_features(additive.LINEAR, FEATURE_MAPS['taylor']), 1e-12),
    'rebased': normalised(
        with_features(additive.LINEAR, FEATURE_MAPS['rebased']), 1e-5),
    'retention': additive.RETENTION,
    'lightning': additive.LIGHTNING,
    'decay': additive.DECAY,
    'mamba2': additive.MAMBA2,
    'gla': additive.GLA,
    'hgrn2': additive.HGRN2,
    'gsa': slots.GSA,
    'delta': delta.DELTA,
    'gated_delta': delta.GATED_DELTA,
    'gated_delta_product': delta.GATED_DELTA_PRODUCT,
    'kda': delta.KDA,
    'gated_delta_2': delta.GATED_DELTA_2,
    'rwkv6': rwkv.RWKV6,
    'rwkv7': rwkv.RWKV7,
    'ttt_linear': online.TTT_LINEAR,
    'titans': online.TITANS,
}


def get(
    name: str,
    feature_map: str = 'identity',
    normaliser: bool = False,
    num_householder: int = 1,
) -> Rule:
  """Return a rule by name, with a feature map and a normaliser.

  Args:
    num_householder: updates per token.

  Raises:
    ValueError: the rule or map is unknown, or they do not go together; the
      message names the setting and lists the alternatives.
  """
  for key, value, known in (
      ('rule', name, RULES), ('feature_map', feature_map, FEATURE_MAPS)):
    if value not in known:
      raise ValueError(
          f'config.model.mixer.{key}={value!r} must be one of'
          f' {", ".join(sorted(known))}.'
      )
  rule = RULES[name]
  if num_householder > 1 and rule.single_update:
    raise ValueError(
        f'config.model.mixer.num_householder={num_householder} must be 1 under'
        f' rule={name!r}, whose tokens update once.'
    )
  if feature_map == 'identity' and not normaliser:
    return rule
  if name not in MAPPED:
    setting = 'normaliser=True' if feature_map == 'identity' else (
        f'feature_map={feature_map!r}')
    raise ValueError(
        f'config.model.mixer.{setting} is for the rules'
        f' {", ".join(sorted(MAPPED))}; rule={name!r} has none.'
    )
  if feature_map != 'identity':
    rule = with_features(rule, FEATURE_MAPS[feature_map])
  return normalised(rule) if normaliser else rule


# Additive rules whose decay, if any, is shared by all key channels.
MAPPED = ('linear', 'retention', 'lightning', 'decay')
