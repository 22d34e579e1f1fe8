"""What a model draws and writes, beside what is real."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mom_jax import checkpoint, decode, figures, sampling
from mom_jax.data import pipeline
from mom_jax.tasks.run import Result, Run

PAIRS = 8  # captions of each split on the sheet of samples
POOL = 4096  # pairs of each split that they are chosen from
PROMPT, NEW = 48, 200  # tokens given of a text and drawn after it
DRAWN = sampling.Filters(temperature=0.8, top_k=0, top_p=0.95, min_p=0.0)
LIKELIEST = sampling.Filters(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


def samples(run: Run) -> Result:
  """Images drawn for captions, captions for images, continued texts."""
  chosen = {
      title: _choose(pairs) for title, pairs in zip(
          ('captions seen in training', 'captions not seen in training'),
          pipeline.pairs(run.cfg, POOL) if run.vocabulary.codes else ([], []))
  }
  pairs = [pair for side in chosen.values() for pair in side]
  result: Result = {'texts': 'samples.txt'}
  lines = []
  if pairs:
    rows, names = _images(run, pairs), _names(run, pairs)
    strips, first = [], 0
    for title, side in chosen.items():
      mine = slice(first, first + len(side))
      first = mine.stop
      if side:
        strips.append(figures.Strip(
            title, {row: made[mine] for row, made in rows.items()},
            [caption for caption, _ in side]))
        lines += [f'== Names for pictures: {title}', *names[mine], '']
    figures.samples(run.workdir / 'samples.png', strips)
    result['picture'] = 'samples.png'
  lines += ['== Texts, continued after |', *_continued(run)]
  path = run.workdir / 'samples.txt'
  with checkpoint.writing(str(path)):
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return result


def _choose(pairs: list[Any]) -> list[Any]:
  """PAIRS of them, the same at every call, at random."""
  order = np.random.default_rng(0).permutation(len(pairs))[:PAIRS]
  return [pairs[i] for i in order]


def _draw(
    run: Run, prompts: list[list[int]], filters: sampling.Filters, count: int
) -> list[list[int]]:
  """At most `count` tokens a prompt."""
  return decode.generate(
      run.modes['causal'], run.params, prompts, decode.grammar(run.vocabulary),
      filters, jax.random.key(0), max_new_tokens=count,
      stop=(run.vocabulary.eos, run.vocabulary.eoi),
  )


def _images(run: Run, pairs: list[Any]) -> dict[str, list[np.ndarray]]:
  """Rows of the sheet: the images of pairs and those drawn for captions."""
  vocabulary = run.vocabulary
  prompts = [
      [*vocabulary.encode([caption], end=False).tolist(), vocabulary.boi]
      for caption, _ in pairs
  ]
  rows = {'real': [image for _, image in pairs]}
  for name, filters in (('likeliest', LIKELIEST), ('drawn', DRAWN)):
    made = _draw(run, prompts, filters, vocabulary.tokens_per_image + 1)
    rows[name] = [vocabulary.decode(tokens)[0] for tokens in made]
  return rows


def _names(run: Run, pairs: list[Any]) -> list[str]:
  """Lines 'real name -> name drawn for its picture'."""
  prompts = [
      run.vocabulary.encode([image], end=False).tolist() for _, image in pairs]
  made = _draw(run, prompts, DRAWN, 64)
  return [f'{caption} -> {_line(run, tokens)}'
          for (caption, _), tokens in zip(pairs, made)]


def _continued(run: Run) -> list[str]:
  """Beginnings of held-out documents without images, continued."""
  vocabulary, prompts = run.vocabulary, []
  for splits in pipeline.open_all(run.cfg, vocabulary):
    documents = splits.validation
    for index in range(min(len(documents.length_N), 64)):
      tokens_T = documents[index][:PROMPT]
      if len(tokens_T) == PROMPT and (tokens_T < vocabulary.boi).all():
        prompts.append(tokens_T.tolist())
        if len(prompts) % 2 == 0:
          break
  prompts = prompts[:4] + [[vocabulary.eos]]
  made = _draw(run, prompts, DRAWN, NEW)
  return [f'{_line(run, prompt)}|{_line(run, tokens)}\n'
          for prompt, tokens in zip(prompts, made)]


def _line(run: Run, tokens: list[int]) -> str:
  """Tokens as text, an image as a mark."""
  parts = run.vocabulary.decode(np.array(tokens, np.int32))
  return ''.join(p if isinstance(p, str) else '[image]' for p in parts)
