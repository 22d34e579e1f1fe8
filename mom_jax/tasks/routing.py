"""Which memories and experts take the tokens of which modality."""

from __future__ import annotations

import numpy as np

from mom_jax import config, figures
from mom_jax.tasks.run import Passed, Result, Run


def routing(run: Run) -> Result:
  """Tokens that each memory and expert took, by layer and modality.

  'taken' are the shares of tokens with no expert, one, and more.
  """
  result = {}
  for mode, passed in run.passed.items():
    maps = heat_maps(run.cfg, passed)
    result[mode] = {
        'tokens': dict(zip(run.cfg.model.modalities,
                           passed.tokens_S.astype(int).tolist())),
        'layers': _layers(run.cfg, passed),
    }
    if maps:
      name = 'routing.png' if mode == 'causal' else f'routing_{mode}.png'
      figures.routing(run.workdir / name, maps)
      result[mode]['picture'] = name
  return result


def _layers(cfg: config.Config, passed: Passed) -> Result:
  """{layer: {part: {modality: tokens of each memory or expert}}}, and 'taken'.
  """
  result: Result = {}
  for layer, part, load_SE in loads(cfg, passed):
    result.setdefault(str(layer), {})[part] = {
        name: row.astype(int).tolist()
        for name, row in zip(cfg.model.modalities, load_SE)
    }
  unit = len(cfg.model.unit)
  for block, taken_RS3 in passed.taken.items():
    for repeat, taken_S3 in enumerate(taken_RS3):
      layer = repeat * unit + int(block.removeprefix('block_'))
      result[str(layer)]['taken'] = {
          name: (row / row.sum()).tolist()
          for name, row in zip(cfg.model.modalities, taken_S3) if row.sum()
      }
  return result


def loads(
    cfg: config.Config, passed: Passed
) -> list[tuple[int, str, np.ndarray]]:
  """(layer, 'mixer' or 'channel', tokens [S, E]) in the order of layers."""
  unit = len(cfg.model.unit)
  found = [
      (repeat * unit + int(name.removeprefix('block_')), part, load_SE)
      for name, parts in passed.load.items()
      for part, load_RSE in parts.items()
      for repeat, load_SE in enumerate(load_RSE)
  ]
  return sorted(found, key=lambda item: item[:2])


def heat_maps(
    cfg: config.Config, passed: Passed
) -> list[list[figures.HeatMap]]:
  """Panels: memories and experts from top to bottom, modalities beside."""
  found = loads(cfg, passed)
  experts = np.cumsum((0, *cfg.model.moma.experts))
  rows = []
  for part, word in (('mixer', 'memory'), ('channel', 'expert')):
    here = [(layer, load_SE) for layer, p, load_SE in found if p == part]
    row = []
    for s, name in enumerate(cfg.model.modalities):
      if not here or not passed.tokens_S[s]:
        continue
      share_LE = np.stack([load_SE[s] for _, load_SE in here])
      share_LE = share_LE / passed.tokens_S[s]
      columns = range(share_LE.shape[1])
      own = len(cfg.model.moma.experts) > 1
      if part == 'channel' and own:  # a modality has experts of its own
        columns = range(experts[s], experts[s + 1])
      row.append(figures.HeatMap(
          f'{name} tokens, {word}', share_LE[:, list(columns)],
          [layer for layer, _ in here], [str(c) for c in columns]))
    if row:
      rows.append(row)
  return rows
