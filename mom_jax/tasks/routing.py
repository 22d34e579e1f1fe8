"""Which memories and experts take the tokens of which modality."""

from __future__ import annotations

import numpy as np

from mom_jax import config, figures
from mom_jax.models import outputs
from mom_jax.tasks.run import Passed, Result, Run

TOP = 12  # tokens shown of each memory and expert


def routing(run: Run) -> Result:
  """Tokens that each memory and expert took, by layer and modality.

  'taken' are the shares of tokens with no expert, one, and more; of
  'specialisation' see `specialisation`.
  """
  result = {}
  for mode, passed in run.passed.items():
    maps = heat_maps(run.cfg, passed)
    result[mode] = {
        'tokens': dict(zip(run.cfg.model.modalities,
                           passed.tokens_S.astype(int).tolist())),
        'layers': _layers(run.cfg, passed),
        'specialisation': specialisation(run, passed),
    }
    if maps:
      name = 'routing.png' if mode == 'causal' else f'routing_{mode}.png'
      figures.routing(run.workdir / name, maps)
      result[mode]['picture'] = name
      name = name.replace('routing', 'specialisation')
      _draw(run, result[mode]['specialisation'], name)
      result[mode]['specialisation']['picture'] = name
  return result


def specialisation(run: Run, passed: Passed) -> Result:
  """What the choice of memories and experts has to do with the token.

    I = sum_we p(w, e) log(p(w, e) / (p(w) p(e))),   nats

  with p(w, e) the share, of all choices of a layer, of memory or expert e for
  token w. 'chance' is I of as many choices drawn from p(w) p(e), for counts
  that are finite have some. 'top' are, of each e, the tokens with the greatest
  terms.

  Returns:
    {'layers': {layer: {'mixer' or 'channel': {'information', 'chance',
    'top'}}}}.
  """
  found: Result = {}
  for layer, part, count_EW in outputs.layers(passed.tokens):
    found.setdefault(str(layer), {})[part] = _specialised(run, count_EW)
  return {'layers': found}


def _specialised(run: Run, count_EW: np.ndarray) -> Result:
  if not count_EW.any():  # nothing reached a threshold
    return {'information': 0.0, 'chance': 0.0, 'top': [[] for _ in count_EW]}
  drawn_EW = np.random.default_rng(0).multinomial(
      int(count_EW.sum()), _independent(count_EW).ravel())
  top = []
  for term_W in terms(count_EW):
    best_N = np.argsort(-term_W, kind='stable')[:TOP]
    top.append([_name(run, int(w)) for w in best_N if term_W[w] > 0])
  return {
      'information': float(terms(count_EW).sum()),
      'chance': float(terms(drawn_EW.reshape(count_EW.shape)).sum()),
      'top': top,
  }


def _independent(count_EW: np.ndarray) -> np.ndarray:
  """p(e) p(w)."""
  p_EW = count_EW / count_EW.sum()
  return p_EW.sum(1, keepdims=True) * p_EW.sum(0, keepdims=True)


def terms(count_EW: np.ndarray) -> np.ndarray:
  """p(w, e) log(p(w, e) / (p(w) p(e))) of counts; they add up to I."""
  p_EW = count_EW / count_EW.sum()
  both_EW = _independent(count_EW)
  ratio_EW = np.divide(p_EW, both_EW, out=np.ones_like(p_EW), where=p_EW > 0)
  return p_EW * np.log(ratio_EW)


def _name(run: Run, token: int) -> str:
  """A token as text, '<eos>', or '<image 12>'."""
  vocabulary = run.vocabulary
  for name in ('eos', 'pad', 'bos', 'boi', 'eoi'):
    if token == getattr(vocabulary, name):
      return f'<{name}>'
  if token >= vocabulary.image_start:
    return f'<image {token - vocabulary.image_start}>'
  return vocabulary.text.decode([token])


def _draw(run: Run, found: Result, name: str) -> None:
  """The information by layer, beside chance."""
  bars: dict[str, dict[str, float]] = {}
  for layer, parts in found['layers'].items():
    for part, word in (('mixer', 'memories'), ('channel', 'experts')):
      if part in parts:
        bars.setdefault(word, {})[layer] = parts[part]['information']
        bars.setdefault(f'{word}, by chance', {})[layer] = parts[part]['chance']
  layers = list(found['layers'])
  figures.bars(
      run.workdir / name, 'What the choice says about the token',
      [f'layer {n}' for n in layers],
      {key: [values.get(n, 0.0) for n in layers]
       for key, values in bars.items()},
      'mutual information, nats')


def _layers(cfg: config.Config, passed: Passed) -> Result:
  """{layer: {part: {modality: tokens of each memory or expert}}}, and 'taken'.
  """
  result: Result = {}
  for layer, part, load_SE in outputs.layers(passed.load):
    result.setdefault(str(layer), {})[part] = {
        name: row.astype(int).tolist()
        for name, row in zip(cfg.model.modalities, load_SE)
    }
  for layer, _, taken_S3 in outputs.layers(passed.taken):
    result[str(layer)]['taken'] = {
        name: (row / row.sum()).tolist()
        for name, row in zip(cfg.model.modalities, taken_S3) if row.sum()
    }
  return result


def heat_maps(
    cfg: config.Config, passed: Passed
) -> list[list[figures.HeatMap]]:
  """Panels: memories and experts from top to bottom, modalities beside."""
  found = list(outputs.layers(passed.load))
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
