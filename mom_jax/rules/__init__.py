"""Memory-update rules as values.

A `Rule` says what a memory needs beside queries, keys and values: learnt
per-layer constants, per-token gates (linear maps of the layer's input), and how
all of that becomes the operands of `pallas.chunk_memory`. The module that uses
a rule makes the parameters; `run` takes them to what each row reads. A new rule
is one section in a file here and its line in `RULES`.

Shapes: R rows, H heads, K and V the sizes of a key and a value of a head, D the
width of a layer.
"""

from __future__ import annotations

from mom_jax.rules import additive, delta, online, rwkv, slots
from mom_jax.rules.features import FEATURE_MAPS, normalised, with_features
from mom_jax.rules.rule import (
    Constant,
    Gate,
    Operands,
    Rule,
    l2_normalise,
    layer_values,
    run,
)

__all__ = [
    'Constant', 'FEATURE_MAPS', 'Gate', 'Operands', 'RULES', 'Rule', 'get',
    'l2_normalise', 'layer_values', 'normalised', 'run', 'with_features',
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
    writes: int = 1,
) -> Rule:
  """The rule of that name, with a feature map and a normaliser.

  Raises:
    ValueError: there is no such rule or map, or the rule cannot have it; names
      the setting, lists what can be.
  """
  for key, value, known in (
      ('rule', name, RULES), ('feature_map', feature_map, FEATURE_MAPS)):
    if value not in known:
      raise ValueError(
          f'config.model.mixer.{key}={value!r} must be one of'
          f' {", ".join(sorted(known))}.'
      )
  rule = RULES[name]
  if writes > 1 and rule.one_write:
    raise ValueError(
        f'config.model.mixer.writes={writes} must be 1 under rule={name!r},'
        ' whose tokens write once.'
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


# Additive rules whose decay, if any, is one for all key channels.
MAPPED = ('linear', 'retention', 'lightning', 'decay')
