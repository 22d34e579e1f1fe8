"""The recall-intensive suite on local files: questions about a given text.

  python -m mom_jax.evaluate --workdir=runs/mine --task=fda:fda.jsonl

A file has one JSON object per line, as datasets' `to_json` writes the
validation split of a benchmark: "text" and "value", or "context", "question"
and "answers". A model reads the last 2048 tokens, the answer included, and
writes 48; it is right if the first line that it writes contains an answer.

Source: arXiv 2407.05483 and its fork of lm-eval; the sets are SUITE's.
"""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config
from mom_jax.data import files
from mom_jax.tasks import scoring
from mom_jax.tasks.run import Result, Run, say

READ, WRITTEN = 2048, 48  # tokens of a text with its answer, and of the answer
ROWS = 8
Row = dict[str, Any]


class Benchmark(NamedTuple):
  """A set of questions.

  Attributes:
    hub: name on the Hugging Face hub.
    fields: of each row.
    prompt, answers: made from a row.
  """

  hub: str
  fields: tuple[str, ...]
  prompt: Callable[[Row], str]
  answers: Callable[[Row], list[str]]


def _completion(hub: str) -> Benchmark:
  """Make a benchmark of texts that end where a value follows."""
  return Benchmark(hub, ('text', 'value'), lambda row: row['text'].strip(),
              lambda row: [row['value'].strip()])


def _question(hub: str, mark: str = '') -> Benchmark:
  """Make a benchmark of contexts and questions.

  Args:
    mark: a pattern that is removed from contexts.
  """

  def prompt(row: Row) -> str:
    context, question = row['context'].strip(), row['question'].strip()
    context = re.sub(mark, '', context) if mark else context
    while question and context.lower().endswith(question.lower()):
      context = context[:-len(question)]
    return context.strip().strip('.') + '. ' + question

  return Benchmark(hub, ('context', 'question', 'answers'), prompt,
              lambda row: list(row['answers']))


SUITE = {
    'fda': _completion('hazyresearch/based-fda'),
    'swde': _completion('hazyresearch/based-swde'),
    'squad_completion': _completion('hazyresearch/based-squad'),
    'nq': _question('hazyresearch/based_nq_2048'),
    'triviaqa': _question(
        'hazyresearch/based_triviaqa', r'\[PAR\]|\[DOC\]|\[TLE\]'),
    'drop': _question('hazyresearch/based_drop'),
}


def check(text: str) -> tuple[Benchmark, pathlib.Path]:
  """Return the benchmark and file of 'fda:FILE'.

  Raises:
    UserError: there is no such file.
  """
  name, _, file = text.partition(':')
  benchmark, path = SUITE[name], pathlib.Path(os.path.expanduser(file))
  if not file or not path.is_file():
    raise config.UserError(
        f'--task={text} needs a file, which must be downloaded first. Run:'
        f" python -c \"import datasets; datasets.load_dataset("
        f"'{benchmark.hub}', split='validation').to_json('{name}.jsonl')\" and"
        f' give --task={name}:{name}.jsonl.'
    )
  return benchmark, path


def contains(run: Run, text: str) -> Result:
  """Fraction of rows of 'fda:FILE' whose answer is in the model's text.

  Returns:
    'contains', the fraction; its standard 'error'; 'count' of rows; 'cut', the
    number of rows that were longer than READ.
  """
  benchmark, path = check(text)
  reader = files.JsonLines(path)
  rows = [_row(reader, index, benchmark, path) for index in range(len(reader))]
  if not rows:
    raise config.UserError(f'--task={text}: the file holds no rows.')
  prompts = [
      [run.vocabulary.bos,
       *run.vocabulary.encode_text(benchmark.prompt(row)).tolist()]
      for row in rows
  ]
  right = []
  for first in range(0, len(rows), ROWS * 16):
    some = slice(first, first + ROWS * 16)
    made = scoring.continuations(
        run, prompts[some], [WRITTEN] * len(prompts[some]), ROWS, READ)
    right += [
        contains_answer(scoring.cut(answer, ['\n']), benchmark.answers(row))
        for answer, row in zip(made, rows[some])]
    say(f'{text}: {len(right)} of {len(rows)} rows, of which'
        f' {100 * np.mean(right):.1f} % contain the answer')
  return {
      'contains': float(np.mean(right)),
      'error': float(np.std(right) / np.sqrt(len(right))),
      'count': len(rows),
      'cut': sum(len(p) > READ - WRITTEN for p in prompts),
  }


def _row(
    reader: files.JsonLines, index: int, benchmark: Benchmark,
    path: pathlib.Path,
) -> Row:
  row = reader.row(index)
  *texts, last = (row.get(field) for field in benchmark.fields)
  answers = last if benchmark.fields[-1] == 'answers' else [last]
  if not isinstance(answers, list) or not answers or not all(
      isinstance(x, str) for x in (*texts, *answers)):
    raise config.UserError(
        f'{path} row {index} needs {", ".join(benchmark.fields)}, each a text'
        ' and answers a list of texts that is not empty; it has'
        f' {str(sorted(row))[:200]}.')
  return row


def contains_answer(text: str, answers: list[str]) -> bool:
  """Return True if the text contains an answer, in any case."""
  return any(answer.lower() in text.lower() for answer in answers)
