"""Fault campaigns: in a short form, or whole with --campaign=DIR."""

from collections.abc import Callable
import json
import pathlib
from typing import Any, TypeVar

import pytest

T = TypeVar('T')


class Campaign:
  """How much a campaign injects, and what came of it.

  Args:
    folder: where results are noted, one line a case in NAME.jsonl. None: the
      short form, which notes nothing.
  """

  def __init__(self, folder: pathlib.Path | None):
    self._folder = folder

  def size(self, short: T, whole: T) -> T:
    """Returns the one of the two that holds for this form."""
    return short if self._folder is None else whole

  def run(self, name: str, case: str, inject: Callable[[], str]) -> None:
    """Injects a fault and notes its result, unless it has been noted before.

    Args:
      name: of the campaign.
      case: tells the fault from the others of this campaign.
      inject: does it, and returns what came of it in a few words.
    """
    if case in {one['case'] for one in self.noted(name)}:
      return
    result = inject()
    if self._folder is not None:
      with self._file(name).open('a', encoding='utf-8') as f:
        f.write(json.dumps({'case': case, 'result': result}) + '\n')

  def noted(self, name: str) -> list[dict[str, Any]]:
    """Returns the cases that were noted, in order."""
    if self._folder is None or not self._file(name).exists():
      return []
    text = self._file(name).read_text(encoding='utf-8')
    return [json.loads(line) for line in text.splitlines()]

  def _file(self, name: str) -> pathlib.Path:
    return self._folder / f'{name}.jsonl'


@pytest.fixture(scope='session')
def campaign(request: pytest.FixtureRequest) -> Campaign:
  folder = request.config.getoption('--campaign')
  if folder is None:
    return Campaign(None)
  path = pathlib.Path(folder).absolute()
  path.mkdir(parents=True, exist_ok=True)
  return Campaign(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks every test of this folder."""
  here = pathlib.Path(__file__).parent
  for item in items:
    if here in item.path.parents:
      item.add_marker('fault')
      item.add_marker('slow')
