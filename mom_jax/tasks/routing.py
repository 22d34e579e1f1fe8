"""Load of memories and experts by modality, and their specialisation."""

from __future__ import annotations

import numpy as np

from mom_jax import config, figures
from mom_jax.models import outputs
from mom_jax.tasks.run import Result, Run, ValidationSums

TOP = 12  # tokens listed per memory and expert


def routing(run: Run) -> Result:
  """Count tokens of each memory and expert, by layer and modality.

  'experts_per_token' are the fractions of tokens with no expert, one, and more;
  for 'specialisation' see there.
  """
  result = {}
  for mode, sums in run.validation_sums.items():
    maps = heat_maps(run.cfg, sums)
    result[mode] = {
        'tokens': dict(zip(run.cfg.model.modalities,
                           sums.tokens_S.astype(int).tolist())),
        'layers': _layers(run.cfg, sums),
        'specialisation': specialisation(run, sums),
    }
    if maps:
      name = 'routing.png' if mode == 'causal' else f'routing_{mode}.png'
      figures.routing(run.output / name, maps)
      result[mode]['picture'] = name
      name = name.replace('routing', 'specialisation')
      _draw(run, result[mode]['specialisation'], name)
      result[mode]['specialisation']['picture'] = name
  return result


def specialisation(run: Run, sums: ValidationSums) -> Result:
  """Mutual information between tokens and the memories or experts they take.

    I = sum_we p(w, e) log(p(w, e) / (p(w) p(e))),   nats

  with p(w, e) the fraction of a layer's rows with token w and memory or expert
  e. 'chance' is I of as many rows drawn from p(w) p(e), since finite counts
  have some. 'top' lists the tokens with the greatest terms of each e.

  Returns:
    {'layers': {layer: {'mixer' or 'channel': {'information', 'chance',
    'top'}}}}.
  """
  found: Result = {}
  for layer, part, count_EW in outputs.layers(sums.token_counts):
    found.setdefault(str(layer), {})[part] = _specialised(run, count_EW)
  return {'layers': found}


def _specialised(run: Run, count_EW: np.ndarray) -> Result:
  if not count_EW.any():  # no token reached a threshold
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
  """Return p(e) p(w)."""
  p_EW = count_EW / count_EW.sum()
  return p_EW.sum(1, keepdims=True) * p_EW.sum(0, keepdims=True)


def terms(count_EW: np.ndarray) -> np.ndarray:
  """Compute p(w, e) log(p(w, e) / (p(w) p(e))), whose sum is I."""
  p_EW = count_EW / count_EW.sum()
  both_EW = _independent(count_EW)
  ratio_EW = np.divide(p_EW, both_EW, out=np.ones_like(p_EW), where=p_EW > 0)
  return p_EW * np.log(ratio_EW)


def _name(run: Run, token: int) -> str:
  """Return a token as text, '<eos>', or '<image 12>'."""
  vocabulary = run.vocabulary
  for name in ('eos', 'pad', 'bos', 'boi', 'eoi'):
    if token == getattr(vocabulary, name):
      return f'<{name}>'
  if token >= vocabulary.image_start:
    return f'<image {token - vocabulary.image_start}>'
  return vocabulary.text.decode([token])


def _draw(run: Run, found: Result, name: str) -> None:
  """Draw the information by layer, beside chance."""
  bars: dict[str, dict[str, float]] = {}
  for layer, parts in found['layers'].items():
    for part, label in (('mixer', 'memories'), ('channel', 'experts')):
      if part in parts:
        bars.setdefault(label, {})[layer] = parts[part]['information']
        bars.setdefault(f'{label}, by chance', {})[layer] = (
            parts[part]['chance'])
  layers = list(found['layers'])
  figures.bars(
      run.output / name, 'Information of the choice about the token',
      [f'layer {n}' for n in layers],
      {key: [values.get(n, 0.0) for n in layers]
       for key, values in bars.items()},
      'mutual information, nats')


def _layers(cfg: config.Config, sums: ValidationSums) -> Result:
  """Return {layer: {part: {modality: tokens of each memory or expert}}}.

  Layers with experts also have 'experts_per_token'.
  """
  result: Result = {}
  for layer, part, load_SE in outputs.layers(sums.load):
    result.setdefault(str(layer), {})[part] = {
        name: row.astype(int).tolist()
        for name, row in zip(cfg.model.modalities, load_SE)
    }
  for layer, _, count_S3 in outputs.layers(sums.experts_per_token):
    result[str(layer)]['experts_per_token'] = {
        name: (row / row.sum()).tolist()
        for name, row in zip(cfg.model.modalities, count_S3) if row.sum()
    }
  return result


def heat_maps(
    cfg: config.Config, sums: ValidationSums
) -> list[list[figures.HeatMap]]:
  """Make panels: memories above experts, modalities side by side."""
  found = list(outputs.layers(sums.load))
  experts = np.cumsum((0, *cfg.model.moma.experts))
  rows = []
  for part, word in (('mixer', 'memory'), ('channel', 'expert')):
    here = [(layer, load_SE) for layer, p, load_SE in found if p == part]
    row = []
    for s, name in enumerate(cfg.model.modalities):
      if not here or not sums.tokens_S[s]:
        continue
      fraction_LE = np.stack([load_SE[s] for _, load_SE in here])
      fraction_LE = fraction_LE / sums.tokens_S[s]
      columns = range(fraction_LE.shape[1])
      by_modality = len(cfg.model.moma.experts) > 1
      if part == 'channel' and by_modality:
        columns = range(experts[s], experts[s + 1])
      row.append(figures.HeatMap(
          f'{name} tokens, {word}', fraction_LE[:, list(columns)],
          [layer for layer, _ in here], [str(c) for c in columns]))
    if row:
      rows.append(row)
  return rows
