"""The glossary names what exists."""

import pathlib
import re

from mom_jax import config

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'docs/glossary.md').read_text()


def _tables():
  """(header, cells) of every row of every table."""
  header = None
  for line in TEXT.split('\n'):
    if not line.startswith('|'):
      header = None
      continue
    cells = [cell.strip() for cell in line.split('|')[1:-1]]
    if header is None:
      header = cells
    elif set(line) - set('|- '):
      yield header, cells


def _code(cells):
  return [name for cell in cells for name in re.findall('`([^`]+)`', cell)]


def _expanded(path):
  """'a/{b,c}.py' as two paths."""
  found = re.search(r'\{([^}]*)\}', path)
  if not found:
    return [path]
  return [p for name in found[1].split(',')
          for p in _expanded(path.replace(found[0], name, 1))]


def test_symbols_exist():
  """Every word in code of the column 'in code' occurs in the sources."""
  words = set(re.findall(r'\w+', ''.join(
      file.read_text() for file in (ROOT / 'mom_jax').rglob('*.py'))))
  missing = {
      name for header, cells in _tables() if 'in code' in header
      for name in _code([cells[header.index('in code')]]) if '/' not in name
      for word in re.findall(r'[A-Za-z_]\w+', name.removesuffix('.py'))
      if word not in words}
  assert not missing


def test_paths_exist():
  for header, cells in _tables():
    new = header.index('in code') if 'in code' in header else 1
    for name in _code([cells[new]]):
      if '/' not in name or '*' in name or ' ' in name or 'X' in name:
        continue
      for path in _expanded(name):
        if not path.endswith(('.py', '/')):
          continue
        assert any((ROOT / base / path).exists()
                   for base in ('', 'mom_jax', 'mom_jax/pallas/chunk_memory')
                   ) or path == 'mod/', path


def test_new_settings_exist_and_old_ones_do_not():
  known = {key for key, _, _ in config.settings(config.Config())}
  known |= {key.removeprefix('model.') for key in known}
  rows = [cells for header, cells in _tables() if header == ['until 0.1', 'now']
          and re.search('`(train|mixer|model|mesh|data)\\.', cells[0])]
  assert rows
  for old, new in rows:
    for name in _code([old]):
      assert name not in known, name
    for name in _code([new]):
      if '*' not in name and '/' not in name and not name.startswith('='):
        assert name in known, name
