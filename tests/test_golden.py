"""Parity with arrays from the official PyTorch MoM, in evaluation mode.

tests/golden/README.md says where they come from, and which of them are here.
Tolerances are those the arrays come with: max abs error over max(1, largest
entry), 2e-5 for outputs and 1e-4 for gradients in float32.
"""

import dataclasses
import json
import pathlib

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import (
  config,
  convert,
  hf,
  models,
)
from mom_jax.hf import settings as hf_settings
from mom_jax.models import block
from mom_jax.routing import balance

LAYERS = (
    'base', 'cu_seqlens', 'expand_v2', 'leftpad', 'no_output_gate', 'no_shared',
    'single_kv', 'single_kv_no_shared', 'sparse_memory', 'topk1', 'topk_all',
)
DECODES = ('base', 'leftpad', 'no_shared_topk1', 'sparse_memory')
MODELS = ('tied', 'hybrid', 'leftpad')
CHECKPOINTS = ('hf_tied_fp32', 'hf_untied_bf16')


def _read(golden, name):
  z = np.load(golden(f'{name}.npz'))
  meta = json.loads(str(z['meta_json']))
  params = {k[len('param/'):]: z[k] for k in z.files if k.startswith('param/')}
  return z, meta, params


def _layer(meta, params, backend='auto'):
  c = meta['config']
  mixer = config.Mixer(
      num_memories=c['num_memories'], top_k=c['topk'], shared=c['shared_mem'],
      single_kv_proj=c['single_kv_proj'], num_heads=c['num_heads'],
      key_dim=c['head_dim'], value_dim=c['head_dim'] * c['expand_v'],
      output_gate='silu' if c.get('use_output_gate', True) else 'none',
      chunk=16, backend=backend,
  )
  model = dataclasses.replace(
      config.Config().model, width=c['hidden_size'], mixer=mixer,
      norm_eps=meta['norm_eps'],
  )
  return model, hf.tensors.mom_params(model.width, mixer, params)


def _segments(z):
  x = z['x']
  if 'cu_seqlens' in z.files:
    ends = z['cu_seqlens'][1:]
    return jnp.asarray(
        np.searchsorted(ends, np.arange(x.shape[1]), side='right')[None] + 1,
        jnp.int32,
    )
  if 'attention_mask' in z.files:
    return jnp.asarray(z['attention_mask'], jnp.int32)
  return jnp.ones(x.shape[:2], jnp.int32)


backends = pytest.mark.parametrize('backend', ['xla', 'reference'])


@backends
@pytest.mark.parametrize('name', LAYERS)
def test_layer(golden, name, backend):
  z, meta, tensors = _read(golden, f'layer_{name}')
  model, params = _layer(meta, tensors, backend)
  segment = _segments(z)

  def run(params, x):
    layer = block.MIXERS['mom'].make(model)
    y, _, _ = layer.apply({'params': params}, x, None, segment)
    return (y * z['cotangent']).sum(), y

  (_, y), (d_params, d_x) = jax.jit(jax.value_and_grad(
      run, (0, 1), has_aux=True))(params, jnp.asarray(z['x']))
  contract.outputs_agree(y, z['out_eval'], name='output')
  contract.gradients_agree(d_x, z['grad_eval/x'], name='gradient of x')
  want = hf.tensors.mom_params(
      model.width, model.mixer,
      {k[len('grad_eval/param/'):]: z[k] for k in z.files
       if k.startswith('grad_eval/param/')},
  )
  jax.tree_util.tree_map_with_path(
      lambda path, g, w: contract.gradients_agree(g, w, name=str(path)),
      d_params, want)


@backends
@pytest.mark.parametrize('name', DECODES)
def test_decode(golden, name, backend):
  z, meta, tensors = _read(golden, f'decode_{name}')
  model, params = _layer(meta, tensors, backend)
  segment, x, P = _segments(z), jnp.asarray(z['x']), meta['prefill']
  layer = jax.jit(block.MIXERS['mom'].make(model).apply)
  run = lambda a, b, cache: layer(
      {'params': params}, x[:, a:b], cache, segment[:, a:b])[:2]
  full, _ = run(0, x.shape[1], None)
  contract.outputs_agree(full, z['out_full'], name='full')
  cache = block.MIXERS['mom'].init_cache(model, x.shape[0], None)
  out, cache = run(0, P, cache)
  contract.outputs_agree(out, z['out_prefill'], name='prefill')
  _check_cache(z, 'cache_prefill', cache, model.mixer)
  for t in range(P, x.shape[1]):
    out, cache = run(t, t + 1, cache)
    contract.outputs_agree(
        out[:, 0], z['out_steps'][:, t - P], name=f'step {t}')
  _check_cache(z, 'cache_final', cache, model.mixer)


def _check_cache(z, key, cache, mixer):
  """Our [B, G, ...] against memory-major rows, values first, windows of W."""
  M, H, W = mixer.num_memories, mixer.num_heads, mixer.conv_width
  states = cache['state_BGHKV'].swapaxes(0, 1).swapaxes(-1, -2)
  windows = cache['window_BGWF'].swapaxes(0, 1).swapaxes(-1, -2)
  cuts = (H * mixer.key_dim, 2 * H * mixer.key_dim)
  parts = dict(zip('qkv', jnp.split(windows, cuts, axis=2)))
  for kind, where in (('routed', slice(0, M)), ('shared', slice(M, None))):
    if f'{key}/recurrent_{kind}' not in z.files:
      continue
    got = states[where].reshape(-1, *states.shape[2:])
    want = z[f'{key}/recurrent_{kind}']
    contract.outputs_agree(got, want, name=f'{key} {kind} state')
    for part, window in parts.items():
      got = window[where].reshape(-1, *window.shape[2:])
      want = z[f'{key}/conv_{part}_{kind}'][..., 1 - W :]
      contract.outputs_agree(got, want, name=f'{key} {kind} {part} window')


@pytest.mark.parametrize('backend', [
    'xla', pytest.param('reference', marks=pytest.mark.slow_law)])
@pytest.mark.parametrize('name', MODELS)
def test_model(golden, name, backend):
  z, meta, tensors = _read(golden, f'model_{name}')
  published = dict(
      meta['config'], model_type='mom', norm_eps=1e-6, use_output_gate=True)
  cfg = config.override(hf_settings.config_from_hf(published), [
      'model.mixer.chunk=16', f'model.mixer.backend={backend}'])
  params = hf.tensors.from_state_dict(cfg.model, tensors)
  tokens, labels = jnp.asarray(z['input_ids']), z['labels']
  mask = np.ones_like(labels)
  if 'attention_mask' in z.files:
    mask = z['attention_mask']
  segment = jnp.asarray(mask, jnp.int32)
  lm = models.LM(cfg)

  def loss(params):
    out = lm.apply({'params': params}, tokens, segment_BT=segment)
    logp = jax.nn.log_softmax(out.logits[:, :-1])
    target = jnp.asarray(labels[:, 1:])
    kept = target != -100
    ce = -jnp.take_along_axis(
        logp, jnp.where(kept, target, 0)[..., None], -1)[..., 0]
    ce = jnp.where(kept, ce, 0).sum() / kept.sum()
    aux = balance.over_layers(
        [block.mixer.stats for block in out.aux
         if block.mixer.stats is not None], 'model')
    return ce + 0.01 * aux, (ce, aux, out.logits)

  (total, (ce, aux, logits)), grads = jax.jit(jax.value_and_grad(
      loss, has_aux=True))(params)
  valid = mask > 0
  contract.outputs_agree(logits[valid], z['logits'][valid], name='logits')
  contract.outputs_agree(ce, z['ce_loss'], name='cross entropy')
  contract.outputs_agree(aux, z['aux_loss'], name='balance')
  contract.outputs_agree(total, z['loss'], name='loss')
  wanted = {k[len('grad_eval/param/'):]: z[k] for k in z.files
            if k.startswith('grad_eval/param/')}
  if wanted:
    jax.tree_util.tree_map_with_path(
        lambda path, g, w: contract.gradients_agree(g, w, name=str(path)),
        grads, hf.tensors.from_state_dict(cfg.model, wanted))
  _check_decode(lm, cfg, params, tokens, segment, meta['prefill'], z, valid)


def _check_decode(lm, cfg, params, tokens, segment, P, z, valid):
  run = jax.jit(lm.apply)
  cache = models.init_cache(cfg, len(tokens), tokens.shape[1])
  out = run({'params': params}, tokens[:, :P], segment_BT=segment[:, :P],
            cache=cache)
  logits = [out.logits]
  for t in range(P, tokens.shape[1]):
    out = run({'params': params}, tokens[:, t : t + 1],
              segment_BT=segment[:, t : t + 1], cache=out.cache)
    logits.append(out.logits)
  got = np.concatenate(logits, 1)
  contract.outputs_agree(
      got[valid], z['decode_logits'][valid], name='decoded logits')


@backends
@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoint(golden, name, backend, tmp_path):
  """Read, run, write, read: same logits, same bits."""
  cfg, params = convert.load_hf(golden(name))
  z = np.load(golden(name) / 'golden_logits.npz')
  exact = config.override(
      cfg, ['model.dtype=float32', f'model.mixer.backend={backend}'])
  out = jax.jit(models.LM(exact).apply)(
      {'params': params}, jnp.asarray(z['input_ids']))
  contract.outputs_agree(out.logits, z['logits'], name='logits')
  convert.save_hf(tmp_path, cfg, params)
  again, same = convert.load_hf(tmp_path)
  assert again == cfg
  jax.tree.map(np.testing.assert_array_equal, params, same)


def test_shipped_arrays_are_those_of_the_whole_set(golden):
  """To the bit; and the repository's folder alone is no large one."""
  shipped = pathlib.Path(__file__).parent / 'golden'
  files = [path for path in shipped.rglob('*')
           if path.suffix in ('.npz', '.safetensors')]
  assert 2.5e6 < sum(path.stat().st_size for path in files) < 3.5e6
  kinds = {path.name.partition('_')[0] for path in shipped.glob('*_*')}
  assert kinds == {'layer', 'decode', 'model', 'hf', 'op'}
  for path in files:
    whole = golden(str(path.relative_to(shipped)))
    if path.suffix != '.npz':
      assert path.read_bytes() == whole.read_bytes()
      continue
    with np.load(path) as mine, np.load(whole) as theirs:
      for key in mine:
        assert mine[key].dtype == theirs[key].dtype
        assert mine[key].tobytes() == theirs[key].tobytes()
