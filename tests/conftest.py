"""One environment for all tests: 8 CPU devices, strict shapes and types."""

from collections.abc import Callable
from importlib import metadata
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tests compile much and compute little; without LLVM's optimisations and each
# program as one module they take half the time. Set XLA_FLAGS to run them as
# users run the library.
FLAGS = ('--xla_backend_optimization_level=0'
         ' --xla_cpu_parallel_codegen_split_count=1')
# Without emitters of fast fusions it is half again. Only jax 0.10 knows the
# flag, which is fatal to others, libtpu among them: see below.
UNFUSED = ' --xla_cpu_use_fusion_emitters=false'
OURS = os.environ.get('XLA_FLAGS', FLAGS) == FLAGS
if OURS:
  old = metadata.version('jaxlib').startswith('0.10.')
  os.environ['XLA_FLAGS'] = FLAGS + (UNFUSED if old else '')

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
# Commands called in this process would share the first one's folder.
jax.config.update('jax_enable_compilation_cache', False)
jax.config.update('jax_numpy_rank_promotion', 'raise')
install_import_hook('mom_jax', 'beartype.beartype')
if OURS:
  jax.jit(lambda: 1)()  # reads the flags, once and for all
  os.environ['XLA_FLAGS'] = FLAGS

def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
      '--campaign', metavar='DIR',
      help='inject every fault of tests/faults, not a few; results go to DIR,'
           ' and faults that they hold are not injected again')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Marks slow laws as slow."""
  for item in items:
    if item.get_closest_marker('slow_law'):
      item.add_marker('slow')


# Reference arrays of the official MoM: those in the repository, and the whole
# set, where it is at hand; see tests/golden/README.md.
GOLDEN = pathlib.Path(__file__).parent / 'golden'
WHOLE = os.environ.get('MOM_JAX_GOLDEN')


@pytest.fixture(scope='session')
def golden() -> Callable[[str], pathlib.Path]:
  """Path of a file or folder of reference arrays, by its name."""

  def find(name: str) -> pathlib.Path:
    path = pathlib.Path(WHOLE or GOLDEN) / name
    if not path.exists():
      assert not WHOLE, f'{path} is missing (MOM_JAX_GOLDEN={WHOLE})'
      pytest.skip(f'{name} is only in the whole set of reference arrays; set'
                  ' MOM_JAX_GOLDEN to its folder')
    return path

  return find


@pytest.fixture(scope='module', autouse=True)
def forget_compiled():
  """Drops a module's compiled functions when its tests are done.

  Each maps some memory, and Linux lets a process have 65,530 maps: one that
  runs the whole suite without this dies of it.
  """
  yield
  jax.clear_caches()
