"""The recall-intensive suite on local files: what a text says is asked for.

  python -m mom_jax.evaluate --workdir=runs/mine --task=fda:fda.jsonl

A file has one JSON object a line, as datasets' `to_json` writes the validation
split of a suite's set: "text" and "value", or "context", "question" and
"answers". A model reads the end of at most 2048 tokens and writes 48; it is
right if an answer is in what it wrote up to the end of the line.

Source: arXiv 2407.05483 and its fork of lm-eval; the sets are SUITE's.
"""

from __future__ import annotations

from collections.abc import Callable
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config
from mom_jax.data import files
from mom_jax.tasks import scoring
from mom_jax.tasks.run import Result, Run, say

READ, WRITTEN = 2048, 48  # tokens of a text with its answer, of the answer
ROWS = 8
Row = dict[str, Any]


class Form(NamedTuple):
  """Of a set: its name on the Hugging Face hub, fields, prompt and answers."""

  hub: str
  fields: tuple[str, ...]
  prompt: Callable[[Row], str]
  answers: Callable[[Row], list[str]]


def _completion(hub: str) -> Form:
  """A text that breaks off where the value comes."""
  return Form(hub, ('text', 'value'), lambda row: row['text'].strip(),
              lambda row: [row['value'].strip()])


def _question(hub: str, mark: str = '') -> Form:
  """A context, and a question that is the beginning of its answer.

  Args:
    mark: a pattern that is taken out of contexts.
  """

  def prompt(row: Row) -> str:
    context, question = row['context'].strip(), row['question'].strip()
    context = re.sub(mark, '', context) if mark else context
    while question and context.lower().endswith(question.lower()):
      context = context[:-len(question)]
    return context.strip().strip('.') + '. ' + question

  return Form(hub, ('context', 'question', 'answers'), prompt,
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


def check(text: str) -> tuple[Form, pathlib.Path]:
  """The form and file of 'fda:FILE'.

  Raises:
    UserError: there is no such file.
  """
  name, _, file = text.partition(':')
  form, path = SUITE[name], pathlib.Path(file).expanduser()
  if not file or not path.is_file():
    raise config.UserError(
        f'--task={text} needs a file: this set must be downloaded, which is not'
        f" done here. Run: python -c \"import datasets; datasets.load_dataset("
        f"'{form.hub}', split='validation').to_json('{name}.jsonl')\" and give"
        f' --task={name}:{name}.jsonl.'
    )
  return form, path


def contains(run: Run, text: str) -> Result:
  """Share of rows of 'fda:FILE' whose answer is in what the model writes.

  Returns:
    'contains', the share; its standard 'error'; 'count' of rows; 'cut', how
    many of them were longer than what is read.
  """
  form, path = check(text)
  reader = files.JsonLines(path)
  rows = [_row(reader, index, form, path) for index in range(len(reader))]
  if not rows:
    raise config.UserError(f'--task={text}: the file holds no rows.')
  prompts = [
      [run.vocabulary.bos,
       *run.vocabulary.encode_text(form.prompt(row)).tolist()]
      for row in rows
  ]
  right = []
  for first in range(0, len(rows), ROWS * 16):
    some = slice(first, first + ROWS * 16)
    made = scoring.continuations(
        run, prompts[some], [WRITTEN] * len(prompts[some]), ROWS, READ)
    right += [
        holds(scoring.cut(answer, ['\n']), form.answers(row))
        for answer, row in zip(made, rows[some])]
    say(f'{text}: {len(right)} of {len(rows)} rows, of which'
        f' {100 * np.mean(right):.1f} % contain the answer')
  return {
      'contains': float(np.mean(right)),
      'error': float(np.std(right) / np.sqrt(len(right))),
      'count': len(rows),
      'cut': sum(len(p) > READ - WRITTEN for p in prompts),
  }


def _row(reader: files.JsonLines, index: int, form: Form, path) -> Row:
  row = reader.row(index)
  missing = [field for field in form.fields if field not in row]
  if missing or not form.answers(row):
    raise config.UserError(
        f'{path} row {index} needs {", ".join(form.fields)}, the last with an'
        f' answer; it has {", ".join(row)}.')
  return row


def holds(text: str, answers: list[str]) -> bool:
  """Whether an answer is in the text, in capitals or not."""
  return any(answer.lower() in text.lower() for answer in answers)
