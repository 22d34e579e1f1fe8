"""Generated images, captions and texts beside real ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import figures, models
from mom_jax.data import pipeline
from mom_jax.inference import decode, sampling
from mom_jax.tasks.run import Result, Run
from mom_jax.training import checkpoint

PAIRS = 8  # captions per strip of the sheet
POOL, ROWS = 256, 64  # pairs of a split to choose from, rows per call
PROMPT, NEW = 48, 200  # tokens of a prompt and new ones
WARM = sampling.SamplingParams(0.8, top_k=0, top_p=0.95, min_p=0.0)
COOL = sampling.SamplingParams(0.5, top_k=0, top_p=0.95, min_p=0.0)
DRAWN = {  # rows of a strip
    'drawn at 0.8': WARM,
    'at 0.5, guidance 2': dataclasses.replace(COOL, guidance=2.0),
}
Pairs = list[tuple[str, np.ndarray]]


def samples(run: Run) -> Result:
  """Generate images for captions, captions for images, and texts."""
  chosen = choose_pairs(run) if run.vocabulary.codes else {}
  pairs = [pair for side in chosen.values() for pair in side]
  result: Result = {'texts': 'samples.txt'}
  lines = []
  if pairs:
    rows, names = _images(run, pairs), _names(run, pairs)
    strips, first = [], 0
    for title, side in chosen.items():
      mine = slice(first, first + len(side))
      first = mine.stop
      strips.append(figures.Strip(
          title, {row: made[mine] for row, made in rows.items()},
          [caption for caption, _ in side]))
      lines += [f'== Names for pictures: {title}', *names[mine], '']
    figures.samples(run.output / 'samples.png', strips)
    result['picture'] = 'samples.png'
  lines += ['== Texts, continued after |', *_continued(run)]
  path = run.output / 'samples.txt'
  with checkpoint.writing(str(path)):
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  return result


def choose_pairs(run: Run) -> dict[str, Pairs]:
  """Choose the pairs of each strip by its title: best known, and at random."""
  seen, unseen = map(_pool, pipeline.pairs(run.cfg))
  strips = {
      f'captions seen in training: best known of {len(seen)} at random':
          _best_known(run, seen),
      'captions seen in training: at random': seen[:PAIRS],
      'captions not seen in training: at random': unseen[:PAIRS],
  }
  return {title: pairs for title, pairs in strips.items() if pairs}


def _pool(pairs: Pairs) -> Pairs:
  """Choose POOL pairs at random, the same in every call."""
  order = np.random.default_rng(0).permutation(len(pairs))[:POOL]
  return [pairs[i] for i in order]


def _best_known(run: Run, pairs: Pairs) -> Pairs:
  """Choose pairs whose image is likeliest given its caption.

  No two captions begin with the same word.
  """
  likelihood = _image_likelihood(run, [run.vocabulary.encode(p) for p in pairs])
  best: dict[str, tuple[str, np.ndarray]] = {}
  for index in np.argsort(-likelihood):
    best.setdefault(pairs[index][0].partition(' ')[0], pairs[index])
  return list(best.values())[:PAIRS]


def _image_likelihood(run: Run, documents: list[np.ndarray]) -> np.ndarray:
  """Compute the log-likelihood of the image tokens of each document, nats."""
  cfg = run.modes['causal']
  width = max(map(len, documents), default=0)

  @jax.jit
  def score(params, tokens_BT, segment_BT):
    image_BT = tokens_BT >= run.vocabulary.image_start
    logits_BTW = models.LM(cfg).apply(
        {'params': params}, tokens_BT, image_BT.astype(jnp.int32), segment_BT
    ).logits[:, :-1]
    at_BT = jnp.take_along_axis(
        jax.nn.log_softmax(logits_BTW), tokens_BT[:, 1:, None], 2)[..., 0]
    return (at_BT * image_BT[:, 1:]).sum(1)

  found = [np.zeros(0)]
  for first in range(0, len(documents), ROWS):
    tokens_BT = np.zeros((ROWS, width), np.int32)
    segment_BT = np.zeros_like(tokens_BT)
    some = documents[first : first + ROWS]
    for row, tokens_T in enumerate(some):
      tokens_BT[row, : len(tokens_T)] = tokens_T
      segment_BT[row, : len(tokens_T)] = 1
    found.append(np.asarray(
        score(run.params, tokens_BT, segment_BT))[: len(some)])
  return np.concatenate(found)


def _draw(
    run: Run, prompts: list[list[int]],
    sampling_params: sampling.SamplingParams, count: int,
) -> list[list[int]]:
  """Generate at most `count` tokens per prompt."""
  return decode.generate(
      run.modes['causal'], run.params, prompts, decode.grammar(run.vocabulary),
      sampling_params, jax.random.key(0), max_new_tokens=count,
      stop=(*run.vocabulary.stop, run.vocabulary.eoi),
  )


def _images(run: Run, pairs: Pairs) -> dict[str, list[np.ndarray]]:
  """Make the rows of the sheet: real images, and images for the captions."""
  vocabulary = run.vocabulary
  prompts = [
      [*vocabulary.encode([caption], end=False).tolist(), vocabulary.boi]
      for caption, _ in pairs
  ]
  rows = {'real': [image for _, image in pairs]}
  for name, sampling_params in DRAWN.items():
    made = _draw(run, prompts, sampling_params, vocabulary.tokens_per_image + 1)
    rows[name] = [vocabulary.decode(tokens)[0] for tokens in made]
  return rows


def _names(run: Run, pairs: Pairs) -> list[str]:
  """Write lines 'real name -> name generated for its picture'."""
  prompts = [
      run.vocabulary.encode([image], end=False).tolist() for _, image in pairs]
  made = _draw(run, prompts, COOL, 64)
  return [f'{caption} -> {_line(run, tokens)}'
          for (caption, _), tokens in zip(pairs, made)]


def _continued(run: Run) -> list[str]:
  """Continue the beginnings of held-out documents without images."""
  vocabulary, prompts = run.vocabulary, []
  for splits in pipeline.open_all(run.cfg, vocabulary):
    documents = splits.validation
    for index in range(min(len(documents.length_N), 64)):
      tokens_T = documents.part(index, 0, PROMPT)
      if len(tokens_T) == PROMPT and (tokens_T < vocabulary.boi).all():
        prompts.append(tokens_T.tolist())
        if len(prompts) % 2 == 0:
          break
  prompts = prompts[:4] + [[vocabulary.eos]]
  made = _draw(run, prompts, WARM, NEW)
  return [f'{_line(run, prompt)}|{_line(run, tokens)}\n'
          for prompt, tokens in zip(prompts, made)]


def _line(run: Run, tokens: list[int]) -> str:
  """Decode tokens to text with a mark for each image."""
  parts = run.vocabulary.decode(np.array(tokens, np.int32))
  return ''.join(p if isinstance(p, str) else '[image]' for p in parts)
