"""Adapter of a trained model to lm-eval.

  import lm_eval
  from mom_jax.evaluate import LmEvalModel
  lm_eval.simple_evaluate(LmEvalModel('runs/mine'), tasks=['piqa', 'arc_easy'])

Its tasks download their data from the Hugging Face hub. Without the package
(pip install 'mom_jax[lm-eval]') the class only lacks its base class.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
from typing import Any

from mom_jax.tasks import run as runs
from mom_jax.tasks import scoring

try:
  from lm_eval.api.model import LM as _Interface
except ModuleNotFoundError:
  _Interface = object


class LmEvalModel(_Interface):
  """Log-likelihoods and greedy texts of a run, for lm-eval.

  The `args` of a request are (context, continuation), (text,) or (context,
  settings).

  Args:
    workdir: of a run, or of a converted checkpoint.
    batch_size: rows per batch.
    max_length: maximum number of tokens read; longer contexts lose their first
      tokens.
  """

  def __init__(
      self, workdir: str | os.PathLike[str] | runs.Run, batch_size: int = 8,
      max_length: int = 2048,
  ):
    super().__init__()
    self.run = workdir if isinstance(workdir, runs.Run) else runs.load(workdir)
    self.batch_size, self.max_length = int(batch_size), int(max_length)

  def _encode(self, text: str) -> list[int]:
    return self.run.vocabulary.encode_text(text).tolist()

  def _pair(self, context: str, continuation: str):
    """Encode both together and split the tokens where they meet.

    Blanks at the end of a context belong to the continuation, as in lm-eval,
    since tokenizers join a blank to the next word.
    """
    bare = context.rstrip()
    continuation = context[len(bare):] + continuation
    before = self._encode(bare)
    whole = self._encode(bare + continuation)
    return [self.run.vocabulary.bos, *before], whole[len(before):]

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Return (log p of the continuation, is it greedy) of each request."""
    pairs = [self._pair(*request.args) for request in requests]
    return scoring.loglikelihoods(
        self.run, pairs, self.batch_size, self.max_length)

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    """Return log p of each text, read in windows of max_length tokens."""
    split = [
        scoring.windows(self._encode(*request.args), self.run.vocabulary.bos,
                        self.max_length)
        for request in requests
    ]
    found = iter(scoring.loglikelihoods(
        self.run, [pair for pairs in split for pair in pairs],
        self.batch_size, self.max_length))
    return [sum((next(found)[0] for _ in pairs), 0.0) for pairs in split]

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Return greedy text after each context, up to a string of 'until' or eos.

    Raises:
      ValueError: a request asks for sampling, which no suite here needs.
    """
    prompts, counts, ends = [], [], []
    for request in requests:
      context, settings = request.args
      if settings.get('do_sample') or settings.get('temperature'):
        raise ValueError(
            f'generate_until with {settings}: only greedy decoding is'
            ' supported; set do_sample to False and temperature to 0.')
      until = settings.get('until') or []
      ends.append([until] if isinstance(until, str) else list(until))
      counts.append(int(settings.get('max_gen_toks', 256)))
      prompts.append([self.run.vocabulary.bos, *self._encode(context)])
    made = scoring.continuations(
        self.run, prompts, counts, self.batch_size, self.max_length)
    return [scoring.cut(text, until) for text, until in zip(made, ends)]
