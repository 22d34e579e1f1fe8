"""The house rules that can be read off the sources.

Import levels: a module imports lower levels only (and its own package), so that
a part can be read knowing only what lies below it.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'mom_jax'
FILES = sorted(PACKAGE.rglob('*.py'))
SHARDING = PACKAGE / 'parallel/sharding.py'

# Design levels, lowest first; modules of one level may be ordered in turn.
LEVELS = (
    (('config', 'chips', 'pallas'), ('cli',)),
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
  if 'triton' in str(file.relative_to(PACKAGE)) or file.name == 'gpu.py':
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


@each
def test_files_stay_short(file):
  """But for what is to be one file."""
  if str(file.relative_to(PACKAGE)) not in (
      'config.py', 'parallel/all_to_all.py'):
    assert len(file.read_text().splitlines()) < 450


def test_no_drawer_for_everything():
  names = {f.name for f in ROOT.rglob('*.py')
           if not any(p.startswith('.') for p in f.relative_to(ROOT).parts)}
  assert not names & {'utils.py', 'util.py', 'helpers.py', 'common_utils.py'}
