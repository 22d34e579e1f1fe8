"""Pictures of results as PNG files: loss curves, routing, samples.

matplotlib is an optional package, imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import pathlib
import textwrap
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config
from mom_jax.training import checkpoint

Points = Sequence[tuple[float | int, float | int]]  # (x, y)
COLOURS = ('#1f77b4', '#d95f02', '#2ca02c', '#9467bd', '#8c564b', '#111111',
           '#e377c2', '#9a9a00')


class HeatMap(NamedTuple):
  """A panel of a routing picture, whose rows are layers."""

  title: str
  fraction_LE: np.ndarray  # of tokens
  layers: Sequence[int]
  names: Sequence[str]  # of the columns


class Strip(NamedTuple):
  """A band of a sheet of images: rows of equally many images."""

  title: str
  rows: Mapping[str, Sequence[np.ndarray]]  # name -> uint8 [S, S, 3] each
  captions: Sequence[str]


def _figure(width: float, height: float) -> Any:
  """Make an empty figure without a window, sizes in inches."""
  try:
    from matplotlib import figure
  except ModuleNotFoundError as e:
    raise config.UserError(
        "pictures need the package matplotlib; run: pip install"
        " 'mom_jax[demo]'."
    ) from e
  return figure.Figure(figsize=(width, height), layout='constrained')


def _save(figure: Any, path: pathlib.Path) -> None:
  """Write the file atomically."""
  partial = path.with_name(path.name + '.partial')
  with checkpoint.writing(str(path)):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, dpi=120, format='png', facecolor='white')
    os.replace(partial, path)


def loss_curve(
    path: pathlib.Path,
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    unigram_entropy: Mapping[str, float],
) -> None:
  """Draw training and validation loss over steps, a panel per modality.

  Args:
    records: of metrics.jsonl.
    names: modalities.
    unigram_entropy: of validation targets by modality, nats; a modality
      without targets is left out.
  """
  figure = _figure(5.2 * len(names), 4.0)
  axes = figure.subplots(1, len(names), squeeze=False)[0]
  for axis, name in zip(axes, names):
    for prefix, label, style in (
        ('', 'training', dict(color='#9ecae1', lw=1.2)),
        ('val_', 'validation', dict(color='#08519c', lw=2, marker='o', ms=4)),
    ):
      for suffix, shown, dash in (
          ('', '', '-'), ('_noncausal', ' (router sees the future)', ':')):
        steps, values = series(records, f'{prefix}loss_{name}{suffix}')
        if steps:
          axis.plot(steps, values, dash, label=label + shown, **style)
    entropy = unigram_entropy.get(name, np.nan)
    if np.isfinite(entropy):
      axis.axhline(entropy, color='#d95f02', ls='--', lw=1.4,
                   label=f'unigram entropy {entropy:.2f}')
    axis.set(title=name, xlabel='step', ylabel='nats per token')
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    axis.spines[['top', 'right']].set_visible(False)
  _save(figure, path)


def series(
    records: Sequence[Mapping[str, Any]], key: str
) -> tuple[list[int], list[float]]:
  """Return the steps and values of a metric where it is finite."""
  found = [(r['step'], r[key]) for r in records if r.get(key) is not None]
  return [s for s, _ in found], [v for _, v in found]


def savings(
    path: pathlib.Path,
    losses: Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]],
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]],
    dense: str,
) -> None:
  """Draw losses over FLOPs, and below them the FLOPs saved at equal loss.

  Args:
    losses: by panel and arm, (FLOPs, nats) of each run.
    factors: by panel and arm, 'curve': 'loss', 'eta', 'low' and 'high', the
      latter None for one seed; the dense arm has no curve.
    dense: name of the arm with factor 1.
  """
  figure = _figure(4.6 * len(losses), 7.4)
  axes = figure.subplots(2, len(losses), squeeze=False)
  for (name, by_arm), (above, below) in zip(losses.items(), axes.T):
    for number, (arm, runs) in enumerate(by_arm.items()):
      colour = 'black' if arm == dense else f'C{number % 10}'
      for i, points in enumerate(runs):
        above.plot(*zip(*points), color=colour, lw=1, alpha=0.8,
                   label=None if i else arm)
      curve = factors[name][arm].get('curve')
      if curve is None:
        below.axhline(1, color=colour, lw=1, ls='--')
        continue
      below.plot(curve['loss'], curve['eta'], color=colour, lw=1.6)
      if curve['low'][0] is not None:  # at the lowest loss, side by side
        x = curve['loss'][0] - 0.006 * number * (
            curve['loss'][-1] - curve['loss'][0])
        below.plot([x, x], [curve['low'][0], curve['high'][0]],
                   color=colour, lw=2, alpha=0.7)
    above.set(title=name, xscale='log', xlabel='training FLOPs',
              ylabel='nats per token')
    runs = [points for of in by_arm.values() for points in of]
    bottom = min(loss for points in runs for _, loss in points)
    top = max(points[min(1, len(points) - 1)][1] for points in runs)
    above.set_ylim(bottom - 0.03 * (top - bottom), top)
    below.set(xlabel='loss, nats per token',
              ylabel=f'FLOPs of {dense} / FLOPs', yscale='log')
    etas = [e for f in factors[name].values() for e in f.get('curve', {}).get(
        'eta', [])]
    below.set_ylim(min(0.5, *etas), max(2.0, *etas))  # long bars are cut
    below.set_yticks([0.5, 1, 2], ['0.5', '1', '2'])
    below.minorticks_off()
    below.invert_xaxis()
    for axis in (above, below):
      axis.grid(alpha=0.25)
      axis.spines[['top', 'right']].set_visible(False)
  axes[0][0].legend(frameon=False, fontsize=8)
  _save(figure, path)


def lines(
    path: pathlib.Path,
    panels: Mapping[str, Mapping[str, Points]],
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
    level: Mapping[str, float] | None = None,
) -> None:
  """Draw lines over a logarithmic axis, panels side by side.

  Args:
    panels: by title and name, (x, y) of each point, x > 0.
    level: dashed lines across all panels, by name.
  """
  figure = _figure(4.8 * len(panels), 3.8)
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (title, by_name) in zip(axes, panels.items()):
    for number, (name, points) in enumerate(by_name.items()):
      axis.plot(*zip(*points), marker='o', ms=4, lw=1.6, label=name,
                color=COLOURS[number % len(COLOURS)])
    for name, height in (level or {}).items():
      axis.axhline(height, color='grey', ls='--', lw=1.2, label=name)
    ticks = sorted({x for points in by_name.values() for x, _ in points})
    axis.set_xscale('log', base=2)
    axis.set_xticks(ticks, [f'{x:g}' for x in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set(title=title, xlabel=xlabel)
    if log_y:
      axis.set_yscale('log')
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(framealpha=0.8, edgecolor='none', fontsize=8)
  axes[0].set_ylabel(ylabel)
  _save(figure, path)


def bars(
    path: pathlib.Path,
    title: str,
    names: Sequence[str],
    by_name: Mapping[str, Sequence[float]],
    ylabel: str,
) -> None:
  """Draw groups of bars, those of each name side by side."""
  figure = _figure(max(4.8, 0.6 * len(names) + 2), 3.8)
  axis = figure.subplots()
  width = 0.8 / len(by_name)
  for number, (name, values) in enumerate(by_name.items()):
    axis.bar(np.arange(len(names)) + width * number, values, width, label=name,
             color=COLOURS[number % len(COLOURS)])
  axis.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names, fontsize=8)
  axis.set(title=title, ylabel=ylabel)
  axis.grid(alpha=0.25, axis='y')
  axis.spines[['top', 'right']].set_visible(False)
  axis.legend(frameon=False, fontsize=8)
  _save(figure, path)


def errors(
    path: pathlib.Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
) -> None:
  """Draw the cost of random routing errors.

  Args:
    panels: by title and modality, (error probabilities, added nats).
  """
  figure = _figure(4.6 * len(panels), 3.8)
  axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
  for axis, (title, by_name) in zip(axes, panels.items()):
    for number, (name, (error_probs, added)) in enumerate(by_name.items()):
      axis.plot([100 * p for p in error_probs], added, marker='o', ms=4, lw=1.6,
                label=name, color=COLOURS[number % len(COLOURS)])
    axis.set(title=title, xlabel='wrong decisions, %')
    axis.grid(alpha=0.25)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_ylabel('added loss, nats per token')
  axes[0].legend(frameon=False)
  _save(figure, path)


def routing(path: pathlib.Path, rows: Sequence[Sequence[HeatMap]]) -> None:
  """Draw heat maps of the fraction of tokens that each column took.

  Args:
    rows: panels from top to bottom, left to right.
  """
  columns = max(map(len, rows))
  wide = max(len(h.names) for row in rows for h in row)
  heights = [0.42 * max(len(h.layers) for h in row) + 1.2 for row in rows]
  figure = _figure(columns * (0.75 * wide + 1.6), sum(heights) + 0.5)
  axes = figure.subplots(len(rows), columns, squeeze=False,
                         height_ratios=heights)
  for row, row_axes in zip(rows, axes):
    for axis in row_axes[len(row):]:
      axis.set_axis_off()
    for heat, axis in zip(row, row_axes):
      _heat_map(axis, heat)
  figure.suptitle('Tokens that each memory and expert takes, in %')
  _save(figure, path)


def _heat_map(axis: Any, heat: HeatMap) -> None:
  percent_LE = 100 * heat.fraction_LE
  axis.imshow(percent_LE, cmap='Blues', vmin=0, vmax=100, aspect='auto')
  for layer, values in enumerate(percent_LE):
    for expert, value in enumerate(values):
      axis.text(expert, layer, f'{value:.0f}' if value >= 9.95 else
                f'{value:.1f}', ha='center', va='center', fontsize=8,
                color='white' if value > 55 else 'black')
  axis.set_title(heat.title, fontsize=10)
  axis.set_xticks(range(len(heat.names)), heat.names, fontsize=8)
  axis.set_yticks(range(len(heat.layers)), heat.layers, fontsize=8)
  axis.set_ylabel('layer')
  axis.tick_params(length=0)
  axis.spines[:].set_visible(False)


def samples(path: pathlib.Path, strips: Sequence[Strip]) -> None:
  """Draw a sheet of images, real above generated, with captions."""
  columns = max(len(s.captions) for s in strips)
  names = [name for s in strips for name in s.rows]
  figure = _figure(1.25 * columns + 0.6, 1.45 * len(names) + 0.9 * len(strips))
  parts = np.atleast_1d(figure.subfigures(
      len(strips), 1, height_ratios=[len(s.rows) for s in strips]))
  for part, strip in zip(parts, strips):
    part.suptitle(strip.title, fontsize=11)
    axes = part.subplots(len(strip.rows), columns, squeeze=False)
    for axis in axes.flat:
      axis.set(xticks=[], yticks=[])
      axis.spines[:].set_visible(False)
    for line, (name, images) in zip(axes, strip.rows.items()):
      line[0].set_ylabel(name, fontsize=9)
      for axis, image in zip(line, images):
        axis.imshow(image, interpolation='nearest')
        axis.spines[:].set(visible=True, color='#cccccc')
    for axis, caption in zip(axes[0], strip.captions):
      short = textwrap.shorten(caption, 45, placeholder='...')
      axis.set_title('\n'.join(textwrap.wrap(short, 16)), fontsize=7)
  _save(figure, path)
