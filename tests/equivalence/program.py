"""Runs cases with one of the packages and keeps every number it gives.

  python program.py old FOLDER CASE...   tag `base`, which PYTHONPATH holds
  python program.py new FOLDER CASE...   on the old parameters in FOLDER; prints
                                         what differs

Prepared by test_equivalence.py; README.md says more.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import traceback

# Programs as they are written, not as LLVM and fusions rearrange them: so that
# a rounding that differs is a formula that differs.
FLAGS = ('--xla_backend_optimization_level=0'
         ' --xla_cpu_parallel_codegen_split_count=1'
         ' --xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = os.environ.get('MOM_JAX_EQUIVALENCE_FLAGS', FLAGS)

import cases  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import names  # noqa: E402
import numpy as np  # noqa: E402


def flatten(tree, prefix=''):
  """{'a/b/0': leaf}; keys of dicts, names of fields, numbers of others."""
  out = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    parts = []
    for key in path:
      for attribute in ('key', 'name', 'idx'):
        if hasattr(key, attribute):
          parts.append(str(getattr(key, attribute)))
          break
    out[prefix + '/'.join(parts)] = np.asarray(leaf)
  return out


def renamed(path, *tables):
  """The new name of a path, or None if a table drops it."""
  for pattern, replacement in (line for table in tables for line in table):
    if replacement is None:
      if re.search(pattern, path):
        return None
    else:
      path = re.sub(pattern, replacement, path)
  return path


def translated(path):
  """The new name of an array of a case, or None."""
  kind, _, rest = path.partition('/')
  if kind == 'metrics':
    rest = renamed(rest, names.METRICS)
  elif kind in ('parameters', 'gradient'):
    rest = renamed(rest, names.PARAMETERS)
  elif kind == 'state':
    rest = renamed(rest, names.PARAMETERS, names.STATE)
  return rest if rest is None else f'{kind}/{rest}'


def new_setting(key, value):
  """(new key, new value) of a setting."""
  change = names.VALUES.get(key)
  return names.SETTINGS.get(key, key), change(value) if change else value


def open_config(api, case, new):
  """(the case's settings, those of its recipe by key)."""
  recipe, _, argument = case.recipe.partition(':')
  if new:
    known = names.RECIPES.get(case.recipe, case.recipe)
    recipe, _, argument = known.partition(':')
  folder = pathlib.Path(api.config.__file__).parents[1] / 'configs'
  path = f'{folder / recipe}.py' + (f':{argument}' if argument else '')
  cfg = api.load(path, [])
  found = api.settings(cfg)
  old = {key: found[names.SETTINGS.get(key, key) if new else key]
         for key in ('model.pattern', 'model.image_side')}
  unit = len(old['model.pattern'].split())
  overrides = [*cases.TINY, *case.overrides]
  if old['model.image_side']:
    overrides.append('model.image_side=2')
  for item in overrides:
    if item.startswith('model.pattern='):
      unit = len(item.split())
  overrides.append(f'model.num_layers={unit * case.repeats}')
  if new:
    pairs = [item.partition('=')[::2] for item in overrides]
    pairs = [new_setting(key, value) for key, value in pairs]
    overrides = [f'{key}={value}' for key, value in pairs]
  return api.load(path, overrides), found


def data(vocab, modalities, batch, length):
  """Tokens, modality, segment and weight: two documents a row and padding."""
  random = np.random.default_rng(0)
  shape = (batch, length)
  tokens = random.integers(0, vocab, shape).astype(np.int32)
  # Runs, as texts and images are.
  modality = np.repeat(
      random.integers(0, modalities, (batch, -(-length // 5))), 5, 1)
  modality = modality[:, :length].astype(np.int32)
  segment = 1 + (np.arange(length) >= 17).astype(np.int32) + np.zeros(
      shape, np.int32)
  segment[0, length - 6:] = 0
  weight = random.choice(np.float32([1, 1, 0.5, 0]), shape)
  return tokens, modality, segment, np.where(segment > 0, weight, 0)


def disturbed(params):
  """Far from the start, where parts are zero or equal."""
  def one(path, x):
    number = sum(ord(c) * (i + 1) for i, c in enumerate(path))
    noise = np.random.default_rng(number).normal(size=x.shape)
    return np.asarray(x + 0.05 * noise.astype(x.dtype), x.dtype)

  leaves, tree = jax.tree.flatten(params)
  paths = list(flatten(params))
  return jax.tree.unflatten(tree, list(map(one, paths, leaves)))


def compute(api, cfg, mesh, params, decodes):
  """Every array of a case, by name."""
  model, params = cfg.model, jax.tree.map(jnp.asarray, params)
  B, T = cfg.data.batch_size, cfg.data.seq_len
  rows = data(model.vocab_size, len(model.modalities), B, T)
  out = {}

  @jax.jit
  def forward(params, *inputs):
    def total(params):
      logits = api.logits(cfg, params, *inputs)
      along = np.random.default_rng(1).normal(size=logits.shape)
      return (logits * along.astype(np.float32)).sum(), logits
    (_, logits), grads = jax.value_and_grad(total, has_aux=True)(params)
    return logits, grads

  logits, grads = forward(params, *rows[:3])
  out['logits/'] = np.asarray(logits)
  out |= flatten(grads, 'gradient/')
  if decodes:
    out |= decode(api, api.causal(cfg), params, *rows[:3])
  state, metrics = api.train_step(
      cfg, mesh, jax.tree.map(jnp.copy, params), api.batch(*rows))
  return out | flatten(state, 'state/') | flatten(metrics, 'metrics/')


def decode(api, cfg, params, tokens, modality, segment):
  """Logits of a prefill with padding, then of three tokens one by one."""
  run = jax.jit(lambda *inputs: api.with_cache(cfg, *inputs))
  cache, out = api.cache(cfg, len(tokens), 32), {}
  for name, part in (('prefill', slice(10, 28)), *(
      (f'step {i}', slice(28 + i, 29 + i)) for i in range(3))):
    valid = (segment[:, part] > 0).astype(np.int32)
    if name == 'prefill':
      valid[1, :4] = valid[0, -3:] = 0
    logits, cache = run(
        params, tokens[:, part], modality[:, part], valid, cache)
    out[f'decode/{name}'] = np.asarray(logits)
  return out


def save(path, arrays, settings):
  """One .npz; bfloat16 as its bits."""
  plain = {
      key: x.view(np.uint16) if x.dtype == jnp.bfloat16 else x
      for key, x in arrays.items()}
  meta = {'settings': settings,
          'types': {key: str(x.dtype) for key, x in arrays.items()}}
  partial = path.with_suffix('.partial')
  with partial.open('wb') as file:
    np.savez_compressed(file, meta=json.dumps(meta), **plain)
  partial.replace(path)


def load(path):
  """(arrays as their bits, their types, settings)."""
  with np.load(path) as file:
    meta = json.loads(str(file['meta']))
    arrays = {key: file[key] for key in file if key != 'meta'}
  return arrays, meta['types'], meta['settings']


def file_of(folder, name):
  return pathlib.Path(folder) / (re.sub(r'\W+', '_', name) + '.npz')


def run_old(api, folder, name):
  """Writes the parameters and all numbers of a case."""
  case = cases.CASES[name]
  cfg, recipe = open_config(api, case, new=False)
  mesh = api.mesh(cfg, jax.devices()[:case.devices])
  with jax.set_mesh(mesh):
    # On one device's numbers: no initialiser depends on the mesh.
    params = disturbed(jax.device_get(api.init(cfg, jax.random.key(3))))
    arrays = flatten(params, 'parameters/')
    arrays |= compute(api, cfg, mesh, params, case.decodes)
  save(file_of(folder, name), arrays, api.settings(cfg) | {
      f'recipe/{key}': value for key, value in recipe.items()})


def run_new(api, folder, name):
  """Lines that say what differs."""
  case = cases.CASES[name]
  old, types, settings = load(file_of(folder, name))
  cfg, recipe = open_config(api, case, new=True)
  own = {key.removeprefix('recipe/'): value for key, value in settings.items()
         if key.startswith('recipe/')}
  tiny = {key: value for key, value in settings.items()
          if not key.startswith('recipe/')}
  lines = different_settings(tiny, api.settings(cfg))
  lines += different_settings(own, recipe) if own else []
  wanted = {}
  for path, bits in old.items():
    to = translated(path)
    if to is not None:
      assert to not in wanted, f'two arrays are named {to}'
      wanted[to] = (path, bits, types[path])
  mesh = api.mesh(cfg, jax.devices()[:case.devices])
  with jax.set_mesh(mesh):
    shapes = api.abstract_params(cfg)
    params, missing = [], []
    prefix = 'parameters/'
    paths, tree = jax.tree_util.tree_flatten_with_path(shapes)
    for path in flatten_names(shapes, prefix):
      if path not in wanted:
        missing.append(path)
        continue
      params.append(wanted.pop(path)[1])
    extra = [path for path in wanted if path.startswith(prefix)]
    if missing or extra:
      return [*lines, *(f'{p} is no old parameter' for p in missing),
              *(f'{p} of the old code has no place' for p in extra)]
    shapes = [x.shape for _, x in paths]
    if shapes != [x.shape for x in params]:
      return [*lines, 'parameters have other shapes']
    got = compute(
        api, cfg, mesh, jax.tree.unflatten(tree, params), case.decodes)
  return lines + different_arrays(wanted, got)


def flatten_names(tree, prefix):
  """Paths as `flatten` names them, of shapes."""
  return list(flatten(jax.tree.map(lambda x: np.zeros(()), tree), prefix))


def different_settings(old, new):
  """Lines on settings of the recipe that are not the old ones."""
  plain = lambda x: list(x) if isinstance(x, tuple) else x
  want = dict(new_setting(key, value) for key, value in old.items())
  lines = []
  for key in sorted({*want, *new}):
    if key not in want:
      if key not in names.ADDED:
        lines.append(f'setting {key} is new and not in names.ADDED')
    elif key not in new:
      lines.append(f'setting {key} is missing; see names.SETTINGS')
    elif plain(want[key]) != plain(new[key]):
      lines.append(f'setting {key}: {want[key]!r} -> {new[key]!r}')
  return lines


def different_arrays(wanted, got):
  """Lines on arrays that are not the old ones to the bit."""
  lines = [f'{p} is new; see names.py' for p in sorted({*got} - {*wanted})]
  for path, (source, bits, dtype) in wanted.items():
    if path not in got:
      lines.append(f'{path} is missing (old {source}); see names.py')
      continue
    x = got[path]
    if (x.shape, str(x.dtype)) != (bits.shape, dtype):
      lines.append(f'{path}: {dtype}{bits.shape} -> {x.dtype}{x.shape}')
    elif x.tobytes() != bits.tobytes():
      a = bits.view(jnp.bfloat16) if dtype == 'bfloat16' else bits
      a, b = (np.asarray(v, np.float64) for v in (a, x))
      lines.append(
          f'{path}: {(a != b).sum()} of {a.size} numbers differ, by at most'
          f' {np.abs(a - b).max():.3g} where the largest is'
          f' {np.abs(a).max():.3g}')
  return lines


def main(side, folder, *chosen):
  if side == 'old':
    import old_api as api
  else:
    import new_api as api
  failed = False
  for name in chosen or cases.CASES:
    try:
      if side == 'old':
        if not file_of(folder, name).exists():
          run_old(api, folder, name)
        continue
      lines = run_new(api, folder, name)
    except Exception:  # noqa: BLE001, goes on with the next case
      lines = [traceback.format_exc()]
    failed |= bool(lines)
    print(f'{name}:', '\n  '.join(['differs', *lines] if lines else ['equal']),
          flush=True)
    jax.clear_caches()
  sys.exit(failed)


if __name__ == '__main__':
  devices = 8 if any(
      cases.CASES[name].devices > 1 for name in sys.argv[3:]) else 1
  jax.config.update('jax_num_cpu_devices', devices)
  main(*sys.argv[1:])
