"""README and docs name what exists, and the code in them runs."""

import ast
import dataclasses
import pathlib
import re
import shlex
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, models, routing

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
# Where paths in texts start.
FOLDERS = ('', 'mom_jax', 'mom_jax/pallas', 'mom_jax/pallas/chunk_memory')
NEW = {'mom_jax/rules/tied.py', 'mod/'}  # of an example; a prefix


def _code_of(name):
  text = (ROOT / name).read_text()
  return re.findall(r'```python\n(.*?)```', text, re.DOTALL)


@pytest.mark.parametrize('file', TEXTS, ids=lambda f: f.name)
def test_paths_exist(file):
  text = re.sub(r'```.*?```', '', file.read_text(), flags=re.DOTALL)
  text = text.partition('## Old to new')[0]
  for path in re.findall(r'`([\w./]+/[\w./]*)`', text):
    if path.endswith(('.py', '.md', '.sh', '.json', '/')) and path not in NEW:
      assert any((ROOT / folder / path).exists() for folder in FOLDERS), path
  for link in re.findall(r'\]\(([^)#]+)\)', text):
    assert link.startswith('http') or (file.parent / link).exists(), link


# Languages of fenced blocks.
LANGUAGES = {'bash', 'python', 'json', 'bibtex', 'text'}


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block of a document."""

  file: str
  line: int
  language: str
  text: str

  def __str__(self) -> str:
    return f'{self.file}:{self.line}'


def _blocks(file):
  """Every fenced block of a file, also those that stand in a list."""
  lines, start = file.read_text().split('\n'), None
  for number, line in enumerate(lines, 1):
    if not line.lstrip().startswith('```'):
      continue
    if start is None:
      start, language = number, line.strip()[3:]
      continue
    yield Block(file.relative_to(ROOT).as_posix(), start, language,
                textwrap.dedent('\n'.join(lines[start:number - 1])))
    start = None
  assert start is None, f'{file}:{start} is not closed'


BLOCKS = [block for file in TEXTS for block in _blocks(file)]


@pytest.mark.parametrize('block', BLOCKS, ids=str)
def test_blocks_are_of_a_known_language_and_parse(block):
  assert block.language in LANGUAGES
  if block.language == 'python':
    for node in ast.walk(ast.parse(block.text)):
      if isinstance(node, ast.Import | ast.ImportFrom) and re.match(
          r'(from|import) mom_jax\b', ast.unparse(node)):
        exec(ast.unparse(node), {})
  if block.language == 'json':
    for line in block.text.splitlines():
      ast.literal_eval(line)


def _commands():
  """(block, words) of every command line; those of a line are joined."""
  for block in BLOCKS:
    if block.language == 'bash':
      for line in block.text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r'[A-Z][A-Z0-9_]*=.*', words[0]):
          words.pop(0)
        if words:
          yield pytest.param(words, id=f'{block}-{" ".join(words)[:60]}')


def _flags_of(file: pathlib.Path) -> set[str]:
  """Flags that a Python command defines, by its source."""
  text = file.read_text()
  found = {
      node.args[0].value for node in ast.walk(ast.parse(text))
      if isinstance(node, ast.Call) and node.args
      and re.match('DEFINE|define_path', getattr(node.func, 'attr', ''))
      and isinstance(node.args[0], ast.Constant)}
  if 'settings(config.Sampling())' in text:  # a flag each
    found |= {f.name for f in dataclasses.fields(config.Sampling)}
  return found | {'help'}


def _check_python(file: pathlib.Path, arguments: list[str]) -> None:
  """Flags exist, and settings are what the recipe accepts."""
  overrides = [a.removeprefix('--config.') for a in arguments
               if a.startswith('--config.')]
  values = {}
  for argument in arguments:
    if argument.startswith('--config.'):
      continue
    name, sign, value = argument.partition('=')
    assert name.startswith('--') and name[2:] in _flags_of(file), argument
    if sign:
      values[name[2:]] = value
  recipe = values.get('config', '')
  if recipe.startswith('configs/'):
    config.load(f'{ROOT}/{recipe}', overrides)
  known = {key for key, _, _ in config.settings(config.Config())}
  assert {o.partition('=')[0] for o in overrides} <= known


def _check_script(file: pathlib.Path, arguments: list[str]) -> None:
  """Flags before -- are those of a shell script, or of what it calls."""
  if '--' in arguments:
    split = arguments.index('--')
    _check_python(ROOT / 'mom_jax' / 'train.py', arguments[split + 1:])
    arguments = arguments[:split]
  text = file.read_text()
  for argument in arguments:
    flag = argument.partition('=')[0]
    if flag.startswith('--') and not re.search(f'{flag}(?![-\\w])', text):
      options = (ROOT / 'tests' / 'conftest.py').read_text()
      assert file.name == 'test.sh' and flag in options, argument


@pytest.mark.parametrize('words', list(_commands()))
def test_commands_take_what_they_are_given(words):
  program, *arguments = words
  if program == 'python' and arguments[0] == '-m':
    module = arguments[1].removeprefix('mom_jax.')
    _check_python(ROOT / 'mom_jax' / f'{module}.py', arguments[2:])
  elif program == 'python':
    _check_python(ROOT / arguments[0], arguments[1:])
  elif program == 'bash':
    _check_script(ROOT / arguments[0], arguments[1:])
  elif program.startswith('scripts/'):
    _check_script(ROOT / program, arguments)
  elif program == 'pip':
    extra, = re.findall(r'\[(.*)\]', arguments[-1])
    assert f"'{extra}': [" in (ROOT / 'setup.py').read_text()
  elif program == 'pytest':
    known = re.findall(r'^  "(\w+):', (ROOT / 'pyproject.toml').read_text(),
                       re.MULTILINE)
    assert arguments[0] == '-m'
    assert set(re.findall(r'\w+', arguments[1])) <= {*known, 'or', 'not', 'and'}
  else:
    pytest.fail(f'{program} is no command that this test knows')


def test_the_training_step_of_the_readme_works():
  """As written there; the loss falls, and the router's state moves."""
  code, = (code for code in _code_of('README.md') if 'def train_step' in code)
  x_BTD = jax.random.normal(jax.random.key(2), (1, 16, 512))
  scope = dict(
      x_BTD=x_BTD, modality_BT=jnp.arange(16)[None] % 2,
      my_loss=lambda y_BTD: jnp.square(y_BTD - x_BTD).mean())
  before, _, after = code.partition('variables, loss = train_step')
  exec(before, scope)
  variables, first = scope['train_step'](scope['variables'], x_BTD)
  assert np.asarray(variables['router']['balance_bias']).any()
  assert scope['train_step'](variables, x_BTD)[1] < first
  exec('variables, loss = train_step' + after, scope)
  assert np.isfinite(scope['y_BTD']).all()


def test_the_router_of_the_documentation_works(monkeypatch):
  """As written there, in a layer, against the sum over its experts."""
  code, = _code_of('docs/own_router.md')
  monkeypatch.setitem(routing.ROUTERS, 'relu', None)  # and so removed again
  exec(code, {})
  layer = models.Moma(width=8, experts=(3, 2), hidden=4, router='relu')
  x_BTD = jax.random.normal(jax.random.key(0), (2, 8, 8))
  modality_BT = jnp.arange(16).reshape(2, 8) % 3 - 1  # -1 is padding
  params = layer.init(jax.random.key(1), x_BTD, modality_BT)['params']
  y_BTD, aux = layer.apply({'params': params}, x_BTD, modality_BT)
  logits_BTE = x_BTD @ params['router']['kernel']
  of_modality_BTE = modality_BT[..., None] == jnp.array([[[0, 0, 0, 1, 1]]])
  weight_BTE = jnp.where(of_modality_BTE, jnp.maximum(logits_BTE, 0), 0)
  np.testing.assert_array_equal(aux.stats.selected_BTE, weight_BTE > 0)
  gate, up = jnp.moveaxis(
      jnp.einsum('btd,edif->btief', x_BTD, params['gate_up']), 2, 0)
  np.testing.assert_allclose(y_BTD, jnp.einsum(
      'bte,btef,efd->btd', weight_BTE, jax.nn.silu(gate) * up, params['down']),
      atol=1e-6)
