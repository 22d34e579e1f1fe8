"""README and docs name what exists, and the code in them runs."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import models, routing

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
