"""The house rules that can be read off the sources.

Import levels: a module imports lower levels only (and its own package), so that
a part can be read knowing only what lies below it.
"""

import ast
import functools
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'mom_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
SHARDING = PACKAGE / 'parallel/sharding.py'

# Design levels, lowest first; modules of one level may be ordered in turn.
LEVELS = (
    (('config', 'chips', 'digest', 'pallas'), ('cli', 'compilation')),
    (('routing',), ('parallel',), ('rules',)),
    (('models',),),
    (('data', 'hf', 'inference'), ('training',), ('figures',)),
    (('tasks', 'planning'),),
    (('train', 'generate', 'evaluate', 'convert', 'plan'),),
)
STEPS = [names for level in LEVELS for names in level]
LEVEL = {name: i for i, names in enumerate(STEPS) for name in names}
# Level 1 takes numbers and arrays: it may not know a config object.
NO_CONFIG = sum(LEVELS[1], ()) + ('pallas',)
MESH_AXES = (
    'dcn_data', 'dcn_expert', 'data', 'fsdp', 'expert', 'tensor',
    'context')


def _part(file):
  """'models' for mom_jax/models/lm.py, 'config' for mom_jax/config.py."""
  return file.relative_to(PACKAGE).parts[0].removesuffix('.py')


def _imports(tree):
  """(module, names) of every import, inside functions too."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, ()
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute'
      yield node.module, tuple(alias.name for alias in node.names)


def _own(tree):
  """Parts of mom_jax that a tree imports."""
  for module, names in _imports(tree):
    head, *rest = module.split('.')
    if head == 'mom_jax':
      yield from [rest[0]] if rest else names


@functools.cache
def _parse(file):
  return ast.parse(file.read_text(), str(file))


each = pytest.mark.parametrize(
    'file', FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])


@each
def test_imports_point_downwards(file):
  part = _part(file)
  if part == '__init__':
    assert not list(_own(_parse(file)))
    return
  assert part in LEVEL, f'{part} has no level; add it to LEVELS and design.md'
  for other in _own(_parse(file)):
    assert other == part or LEVEL[other] < LEVEL[part], (
        f'{part} imports {other}')


@each
def test_levels_without_settings_do_not_import_them(file):
  if _part(file) in NO_CONFIG:
    assert 'config' not in set(_own(_parse(file)))


@each
def test_flax_is_known_to_models_and_sharding_only(file):
  heads = {module.split('.')[0] for module, _ in _imports(_parse(file))}
  assert 'flax' not in heads or _part(file) == 'models' or file == SHARDING


@each
def test_kernels_import_jax_and_the_standard_library_only(file):
  if _part(file) != 'pallas':
    return
  allowed = {'jax', 'jaxtyping', 'numpy', 'mom_jax', '__future__'}
  allowed |= {'collections', 'contextlib', 'contextvars', 'dataclasses'}
  allowed |= {'enum', 'functools', 'itertools', 'math', 'typing'}
  if 'triton' in str(file.relative_to(PACKAGE)):
    allowed |= {'importlib', 'jax_triton', 'jaxlib', 'os', 'triton', 'zlib'}
  heads = {module.split('.')[0] for module, _ in _imports(_parse(file))}
  assert heads <= allowed
  assert set(_own(_parse(file))) <= {'pallas'}


@each
def test_triton_is_imported_where_a_gpu_kernel_runs(file):
  """So nothing else needs it: at the top of files of kernels only."""
  if file.parent.name == 'triton' and file.name.startswith('kernels'):
    return
  top = [node for node in _parse(file).body
         if isinstance(node, ast.Import | ast.ImportFrom)]
  for node in top:
    for module, names in _imports(node):
      assert not {module.split('.')[0]} & {'jax_triton', 'triton'}
      assert not any(name.startswith('kernels') for name in names)


@each
def test_mesh_axes_are_named_in_sharding_only(file):
  """As an argument of PartitionSpec, psum and the like, or of mesh.shape.

  Functions of `sharding` and `per_device` take logical axes.
  """
  if file == SHARDING:
    return
  for node in ast.walk(_parse(file)):
    inside = []
    if isinstance(node, ast.Call):
      *module, name = ast.unparse(node.func).split('.')
      logical = module in (['sharding'], ['per_device'])
      if name != 'make_mesh' and logical:
        continue
      if name in ('PartitionSpec', 'P', 'psum', 'pmean', 'all_gather',
                  'all_to_all', 'ragged_all_to_all', 'ppermute', 'axis_index',
                  'axis_size', 'make_mesh'):
        inside = [*node.args, *(k.value for k in node.keywords)]
    elif isinstance(node, ast.Subscript) and ast.unparse(
        node.value).endswith('mesh.shape'):
      inside = [node.slice]
    named = [c.value for part in inside for c in ast.walk(part)
             if isinstance(c, ast.Constant)]
    assert not set(named) & set(MESH_AXES), ast.unparse(node)


def test_sharding_names_the_axes_that_this_test_looks_for():
  from mom_jax.parallel import sharding
  assert tuple(sharding.AXES) == MESH_AXES


def test_settings_and_tables_name_the_same_mixers():
  from mom_jax import config
  from mom_jax.models import block
  assert set(config.MIXERS) == set(block.MIXERS)
  assert set(config.CHANNELS) == set(block.CHANNELS)


def test_settings_and_routers_agree_on_who_picks():
  from mom_jax import config, routing
  assert set(config.TOKEN_CHOICE) == {
      name for name, router in routing.ROUTERS.items() if router.exact_k}


def _is_kernel(file):
  """A file of Pallas or Triton kernels; api.py and the like are none."""
  return _part(file) == 'pallas' and bool(
      {'tpu', 'triton', 'tpu.py', 'triton.py'} & set(file.parts))


def _functions(file):
  """(name, lines of code) of every function; docstrings do not count."""
  for node in ast.walk(_parse(file)):
    if isinstance(node, ast.FunctionDef):
      first = node.body[0]
      docstring = ast.get_docstring(node) is not None
      spent = first.end_lineno - first.lineno + 1 if docstring else 0
      yield node.name, node.end_lineno - node.lineno + 1 - spent


@each
def test_functions_stay_short(file):
  """A longer one has a second subject. Files are as long as their subject."""
  limit = 120 if _is_kernel(file) else 60
  for name, lines in _functions(file):
    assert lines < limit, f'{name} has {lines} lines; {limit} is too many'


def test_functions_are_half_a_screen_long():
  """But for one of twenty."""
  lines = sorted(
      lines for file in FILES for _, lines in _functions(file))
  assert lines[int(0.95 * len(lines))] <= 36


def _modules(file):
  """Files of mom_jax that a file imports."""
  for module, names in _imports(_parse(file)):
    head, *rest = module.split('.')
    if head != 'mom_jax':
      continue
    folder = PACKAGE.joinpath(*rest)
    for path in (folder.with_suffix('.py'), folder / '__init__.py',
                 *(folder / f'{name}.py' for name in names),
                 *(folder / name / '__init__.py' for name in names)):
      if path.is_file() and path != file:
        yield path


def test_imports_run_in_no_circle():
  """Between modules, so between folders too; an `__init__` is no part of it."""
  below = {file: {f for f in _modules(file) if f.name != '__init__.py'}
           for file in FILES}
  while free := [file for file, files in below.items() if not files]:
    for file in free:
      del below[file]
    for files in below.values():
      files.difference_update(free)
  assert not below


FOLDERS = sorted(
    path.name for path in PACKAGE.iterdir() if (path / '__init__.py').is_file())


def _offered(folder):
  """Names that the `__init__` of a folder lists."""
  for node in _parse(PACKAGE / folder / '__init__.py').body:
    if isinstance(node, ast.Assign) and ast.unparse(
        node.targets[0]) == '__all__':
      return ast.literal_eval(node.value)
  raise AssertionError(f'mom_jax/{folder}/__init__.py has no __all__')


def _imported_names(file):
  """(folder, name) of all that a file imports from other folders."""
  tree, imported = _parse(file), {}
  for module, names in _imports(tree):
    head, *rest = module.split('.')
    if head != 'mom_jax':
      continue
    if not rest:
      imported |= {name: name for name in names if name in FOLDERS}
    elif rest[0] in FOLDERS and rest[0] != _part(file):
      for name in names:
        yield rest[0], '.'.join((*rest[1:], name))
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(
        node.value, ast.Name) and node.value.id in imported:
      yield node.value.id, node.attr


@each
def test_folders_import_what_others_offer(file):
  """A name or a module of their `__all__`, and nothing behind it."""
  for folder, name in _imported_names(file):
    assert name in _offered(folder), f'{folder} does not offer {name}'


@pytest.mark.parametrize('folder', FOLDERS)
def test_names_that_a_folder_offers_exist(folder):
  offered = _offered(folder)
  assert sorted(set(offered)) == sorted(offered)
  module = importlib.import_module(f'mom_jax.{folder}')
  for name in offered:
    if not hasattr(module, name):  # a module, imported when it is asked for
      importlib.import_module(f'mom_jax.{folder}.{name}')


def test_all_folders_together_offer_at_most_80_names():
  assert sum(len(_offered(folder)) for folder in FOLDERS) <= 80


# Folders of tests that belong to no folder.
OTHER_TESTS = {'faults', 'fixtures', 'golden', 'scripts'}


def test_tests_mirror_the_folders():
  """And a test file at the root is of a command or of the whole."""
  tests = ROOT / 'tests'
  folders = {path.name for path in tests.iterdir()
             if path.is_dir() and path.name != '__pycache__'}
  assert folders - OTHER_TESTS == set(FOLDERS)
  for folder in FOLDERS:
    assert list((tests / folder).glob('test_*.py')), folder


def test_no_drawer_for_everything():
  names = {f.name for f in ROOT.rglob('*.py')
           if not any(p.startswith('.') for p in f.relative_to(ROOT).parts)}
  assert not names & {'utils.py', 'util.py', 'helpers.py', 'common_utils.py'}
