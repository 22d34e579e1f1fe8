"""Published layouts: names, what the tensors mean, round trips, the command."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import checkpoint, config, convert, hf, models
from mom_jax.data import tokenizers
from mom_jax.hf import layouts
from mom_jax.models import mom

D, LAYERS, WORDS, T = 16, 3, 40, 21

COMMON = dict(
    hidden_size=D, num_hidden_layers=LAYERS, vocab_size=WORDS, norm_eps=1e-6,
    tie_word_embeddings=False, intermediate_size=24, hidden_act='swish',
)
# A config.json of each layout, as its authors' code writes it, and the tensors
# of a mixer.
PUBLISHED = {
    'gated_deltanet': (
        dict(num_heads=2, head_dim=6, expand_v=2.0, use_gate=True,
             use_short_conv=True, conv_size=4, num_v_heads=None,
             allow_neg_eigval=False),
        'q_proj k_proj v_proj a_proj b_proj g_proj o_proj q_conv1d k_conv1d'
        ' v_conv1d o_norm A_log dt_bias'),
    'delta_net': (
        dict(num_heads=2, expand_k=0.75, expand_v=1.0, use_gate=False,
             use_short_conv=True, conv_size=4, qk_norm='l2',
             qk_activation='silu', use_beta=True, use_output_norm=True),
        'q_proj k_proj v_proj b_proj o_proj q_conv1d k_conv1d v_conv1d'
        ' o_norm'),
    'gla': (
        dict(num_heads=2, expand_k=0.5, expand_v=1.0, use_short_conv=False,
             use_output_gate=True, feature_map=None, num_kv_heads=None,
             clamp_min=None, fuse_norm=True),
        'q_proj k_proj v_proj g_proj o_proj gk_proj.0 gk_proj.1'
        ' gk_proj.1.bias g_norm_swish_gate'),
    'hgrn2': (
        dict(num_heads=2, expand_ratio=8, use_short_conv=False,
             use_lower_bound=True),
        'q_proj f_proj i_proj o_proj g_norm'),
    'gsa': (
        dict(num_heads=2, exapnd_k=1, exapnd_v=1, num_slots=64,
             feature_map='swish', use_output_gate=False, use_norm=True,
             use_short_conv=False, num_kv_heads=None, gate_logit_normalizer=8),
        'q_proj k_proj v_proj f_proj o_proj g_norm'),
    'retnet': (
        dict(num_heads=2, expand_k=1.0, expand_v=2.0, use_output_gate=True,
             feature_map=None, fuse_norm=True),
        'q_proj k_proj v_proj g_proj o_proj g_norm_swish_gate'),
    'linear_attn': (
        dict(num_heads=2, expand_k=1.0, expand_v=1.0, norm_feature_map=False,
             feature_map='elementwise_product', tie_feature_map_qk=False),
        'q_proj k_proj v_proj o_proj norm feature_map_q.layer1'
        ' feature_map_q.layer2 feature_map_k.layer1 feature_map_k.layer2'
        ' feature_map_q.layer1.bias feature_map_q.layer2.bias'
        ' feature_map_k.layer1.bias feature_map_k.layer2.bias'),
    'transformer': (
        dict(num_heads=2, num_kv_heads=1, qkv_bias=False, qk_norm=False,
             window_size=None, rope_theta=10000.0),
        'q_proj k_proj v_proj o_proj'),
}
each = pytest.mark.parametrize('kind', sorted(PUBLISHED))


def _published(kind, **more):
  return dict(COMMON, model_type=kind, **PUBLISHED[kind][0]) | more


def _random(cfg, seed=0):
  """Parameters of the model, all of them random."""
  shapes = jax.eval_shape(
      lambda: models.lm.init_params(cfg, jax.random.key(0)))
  shapes = jax.tree.map(
      lambda x: x.value, shapes, is_leaf=lambda x: hasattr(x, 'names'))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), shapes)


@each
def test_tensors_have_their_published_names(kind):
  cfg = hf.config_from_hf(_published(kind))
  tensors = hf.to_state_dict(cfg.model, _random(cfg), mom=False)
  got = {name.removeprefix('model.layers.1.attn.') for name in tensors
         if name.startswith('model.layers.1.attn.')}
  want = {name if name in ('A_log', 'dt_bias') or name.endswith('.bias')
          else name + '.weight' for name in PUBLISHED[kind][1].split()}
  assert got == want
  outside = {name for name in tensors if '.layers.' not in name}
  assert outside == {'model.embeddings.weight', 'model.norm.weight',
                     'lm_head.weight'} | (
      {'model.lower_bounds'} if kind == 'hgrn2' else set())


@each
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trip_is_bit_equal(kind, dtype, tmp_path):
  """Sharded too, with a hybrid's attention layers."""
  more = {} if kind == 'transformer' else dict(
      attn=dict(layers=[1], num_heads=4, num_kv_heads=2, window_size=7))
  cfg = hf.config_from_hf(_published(kind, **more))
  cfg = dataclasses.replace(
      cfg, model=dataclasses.replace(cfg.model, dtype=dtype))
  params = jax.tree.map(
      lambda x: np.asarray(jnp.asarray(x, dtype), np.float32), _random(cfg))
  hf.save(tmp_path, cfg, params, shard=4000)
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  again, same = convert.load_hf(tmp_path)
  assert again == cfg
  jax.tree.map(np.testing.assert_array_equal, same, params)
  written = json.loads((tmp_path / 'config.json').read_text())
  assert written['model_type'] == kind


# What the published layers compute, in float64, from tensors by their names.


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _silu(x):
  return x * _sigmoid(x)


def _conv(w, u):
  padded = np.concatenate([np.zeros((3, u.shape[1])), u])
  return sum(padded[j : j + len(u)] * w['weight'][:, 0, j] for j in range(4))


def _norm(x, weight):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def _unit(x):
  return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def _scan(q, k, v, log_decay=None, beta=None):
  """[T, H, ...]; the read is scaled."""
  S, reads = np.zeros((*q.shape[1:], v.shape[-1])), []
  for t in range(len(q)):
    if log_decay is not None:
      g = np.exp(log_decay[t])
      S = S * g.reshape(*g.shape, *[1] * (3 - g.ndim))
    u = v[t] if beta is None else beta[t][:, None] * (
        v[t] - np.einsum('hk,hkv->hv', k[t], S))
    S = S + k[t][:, :, None] * u[:, None]
    reads.append(np.einsum('hk,hkv->hv', q[t], S))
  return np.stack(reads) * q.shape[-1] ** -0.5


def _oracle(kind, tensors, bound, x):
  """The mixer on x [T, D]."""
  H = 2
  w = {}
  for name, value in tensors.items():
    *path, leaf = name.split('.')
    w.setdefault('.'.join(path), {})[leaf] = np.asarray(value, np.float64)
  proj = lambda name: x @ w[f'{name}_proj']['weight'].T
  heads = lambda u: u.reshape(len(u), H, -1)
  flat = lambda o: o.reshape(len(o), -1)
  if kind == 'hgrn2':
    q, f, v = proj('q'), proj('f'), proj('i')
    f = bound + (1 - bound) * _sigmoid(f)
    o = _scan(heads(_silu(q)), heads(1 - f), heads(v), np.log(heads(f)))
    o = _norm(flat(o), w['g_norm']['weight'])
  elif kind == 'gsa':
    q, k, v = (heads(_silu(proj(n))) for n in 'qkv')
    f = _sigmoid(heads(proj('f'))) ** (1 / 8)
    A, B, reads = np.zeros((H, q.shape[-1], 64)), np.zeros(
        (H, 64, v.shape[-1])), []
    for t in range(len(q)):
      A = A * f[t][:, None] + k[t][:, :, None] * (1 - f[t])[:, None]
      B = B * f[t][:, :, None] + (1 - f[t])[:, :, None] * v[t][:, None]
      score = np.exp(np.einsum('hk,hkm->hm', q[t], A))
      reads.append(np.einsum(
          'hm,hmv->hv', score / score.sum(-1, keepdims=True), B))
    o = _norm(_silu(flat(np.stack(reads))), w['g_norm']['weight'])
  elif kind == 'linear_attn':
    def mapped(u, which):
      one, two = (
          u @ w[f'feature_map_{which}.{n}']['weight'].T
          + w[f'feature_map_{which}.{n}']['bias'] for n in (
              'layer1', 'layer2'))
      return one * two

    q, k, v = (heads(proj(n)) for n in 'qkv')
    o = flat(_norm(_scan(mapped(q, 'q'), mapped(k, 'k'), v),
                   w['norm']['weight']))
  elif kind == 'retnet':
    q, k, v = (heads(proj(n)) for n in 'qkv')

    def turn(u):
      half = u.shape[-1] // 2
      angle = np.arange(len(u))[:, None, None] * 10000.0 ** (
          -np.arange(half) / half)
      a, b = u[..., :half], u[..., half:]
      return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                             b * np.cos(angle) + a * np.sin(angle)], -1)

    decay = np.log(1 - 2.0 ** (-5 - np.arange(H)))
    o = _scan(turn(q), turn(k), v, np.broadcast_to(decay, (len(x), H)))
    o = flat(_norm(o, w['g_norm_swish_gate']['weight'])) * _silu(proj('g'))
  elif kind == 'gla':
    q, k, v = (heads(proj(n)) for n in 'qkv')
    g = x @ w['gk_proj.0']['weight'].T @ w['gk_proj.1']['weight'].T
    g = heads(np.log(_sigmoid(g + w['gk_proj.1']['bias'])) / 16)
    o = flat(_norm(_scan(q, k, v, g), w['g_norm_swish_gate']['weight']))
    o = o * _silu(proj('g'))
  else:
    q, k, v = (
        heads(_silu(_conv(w[f'{n}_conv1d'], proj(n)))) for n in 'qkv')
    g = None
    if kind == 'gated_deltanet':
      dt = np.logaddexp(0, proj('a') + w['']['dt_bias'])
      g = -np.exp(w['']['A_log']) * dt
    o = flat(_norm(_scan(_unit(q), _unit(k), v, g, _sigmoid(proj('b'))),
                   w['o_norm']['weight']))
    if kind == 'gated_deltanet':
      o = o * _silu(proj('g'))
  return o @ w['o_proj']['weight'].T


@pytest.mark.parametrize('kind', sorted({*PUBLISHED} - {'transformer'}))
def test_tensors_mean_what_the_published_layer_computes(kind):
  cfg = hf.config_from_hf(_published(kind))
  cfg = config.override(cfg, ['model.mixer.chunk=8'])
  params = _random(cfg)
  tensors = hf.to_state_dict(cfg.model, params, mom=False)
  prefix, at, bound = 'model.layers.1.attn.', 1, 0
  layer = mom.layer_values(cfg.model, LAYERS, None)
  if kind == 'hgrn2':
    share = np.exp(tensors['model.lower_bounds'].astype(np.float64))
    share /= share.sum(0)
    bound = share[1]
    layer = mom.layer_values(
        cfg.model, LAYERS, {'bound': jnp.asarray(params['layers_bound'])})
  x = np.random.default_rng(1).normal(size=(T, D))
  mine = jax.tree.map(
      lambda a: a[at], params['units']['block_0']['mixer'])
  y, _, _ = jax.jit(mom.Mom(cfg.model).apply)(
      {'params': mine}, jnp.asarray(x, jnp.float32)[None], None,
      jnp.ones((1, T), jnp.int32), jax.tree.map(lambda a: a[at], layer))
  want = _oracle(
      kind, {name.removeprefix(prefix): value for name, value in
             tensors.items() if name.startswith(prefix)}, bound, x)
  contract.outputs_agree(y[0], want)


def test_unknown_or_missing_tensors_are_listed():
  cfg = hf.config_from_hf(_published('gla'))
  tensors = hf.to_state_dict(cfg.model, _random(cfg), mom=False)
  tensors['model.layers.9.attn.x'] = tensors.pop('model.norm.weight')
  with pytest.raises(config.UserError, match=(
      r"missing tensors \['model.norm.weight'\], unknown tensors"
      r" \['model.layers.9.attn.x'\]")):
    hf.from_state_dict(cfg.model, tensors, mom=False)


@pytest.mark.parametrize(
    ('kind', 'more', 'message'),
    [
        ('rwkv4', {}, "model_type='rwkv4'; convert reads delta_net, gated_de"),
        ('gla', dict(feature_map='relu'), "feature_map='relu'; only None"),
        ('gla', dict(num_kv_heads=1), 'num_kv_heads=1; here each'),
        ('gated_deltanet', dict(allow_neg_eigval=True), 'only False is supp'),
        ('gsa', dict(num_slots=32), 'num_slots=32; only 64'),
        ('linear_attn', dict(feature_map='dpfp'), "feature_map='dpfp'; known"),
        ('transformer', dict(qk_norm=True), 'qk_norm=True, whose epsilon'),
    ],
)
def test_settings_without_a_counterpart_are_refused(kind, more, message):
  published = _published(kind if kind in PUBLISHED else 'gla', **more)
  with pytest.raises(config.UserError, match=message):
    hf.config_from_hf(published | {'model_type': kind})


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (['model.mixer.rule=kda'], "no published layout holds .*rule='kda'"),
        (['model.mixer.output_norm=group'], "'gla' has no place for config.m"),
        (['model.channel_norm=post'], "no place for config.model.channel_norm"),
    ],
)
def test_models_without_a_layout_are_refused(changes, message):
  cfg = config.override(hf.config_from_hf(_published('gla')), changes)
  with pytest.raises(config.UserError, match=message):
    layouts.config_to_hf(cfg)


def test_pickles_are_not_read(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(_published('gla')))
  (tmp_path / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n')
  with pytest.raises(config.UserError, match='pytorch_model.bin are not read'):
    convert.load_hf(tmp_path)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """A folder with a tiny checkpoint and its tokenizer."""
  import tokenizers as library
  folder = tmp_path_factory.mktemp('published')
  cfg = hf.config_from_hf(_published('gated_deltanet'))
  convert.save_hf(folder, cfg, _random(cfg))
  written = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(
      written | dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)))
  words = ['<unk>', '<s>', '</s>', *(f'w{i}' for i in range(WORDS - 3))]
  tokenizer = library.Tokenizer(library.models.WordLevel(
      {w: i for i, w in enumerate(words)}, unk_token='<unk>'))
  tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text('{"a": 1}')
  return folder


def _command(module, *flags):
  return subprocess.run(
      [sys.executable, '-m', f'mom_jax.{module}', *flags], timeout=300,
      capture_output=True, text=True, check=False)


def test_from_hf_and_back(published, tmp_path):
  """The command makes a run that generates, trains on and is written back."""
  run, back = tmp_path / 'run', tmp_path / 'back'
  done = _command('convert', f'--from_hf={published}', f'--workdir={run}')
  assert done.returncode == 0, done.stderr
  cfg, params, step = checkpoint.load_params(run)
  assert step == 0
  _, want = convert.load_hf(published)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  vocabulary = tokenizers.load(run)
  assert vocabulary.encode(['w0 w5']).tolist() == [1, 3, 8, 2]
  assert vocabulary.decode([1, 3, 8, 2]) == ['w0 w5']
  assert vocabulary.size == WORDS == cfg.model.vocab_size
  drawn = _command('generate', f'--workdir={run}', '--prompt=w1 w2',
                   '--max_new_tokens=5')
  assert drawn.returncode == 0, drawn.stderr
  assert 'w1 w2' in drawn.stdout
  done = _command('convert', f'--to_hf={back}', f'--workdir={run}')
  assert done.returncode == 0, done.stderr
  for name in ('model.safetensors', 'tokenizer.json', 'tokenizer_config.json'):
    assert (back / name).read_bytes() == (published / name).read_bytes()


def test_training_goes_on_from_a_published_checkpoint(published, tmp_path):
  """Its parameters and vocabulary; in its own workdir it has nothing to do."""
  run, text = tmp_path / 'run', tmp_path / 'text.jsonl'
  convert.from_hf(published, run, [])
  text.write_text('\n'.join(
      json.dumps({'text': ' '.join(f'w{(i * j) % 30}' for j in range(40))})
      for i in range(60)))
  small = (f'--config={run}/config.json', f'--config.data.sources=jsonl:{text}',
           '--config.data.seq_len=32', '--config.data.batch_size=2',
           '--config.train.steps=0', '--config.train.eval_batches=1',
           f'--config.data.cache={tmp_path}/cache')
  done = _command('train', *small, f'--config.train.init_from={run}',
                  f'--workdir={tmp_path}/tuned')
  assert done.returncode == 0, done.stderr
  _, params, _ = checkpoint.load_params(tmp_path / 'tuned')
  _, want = convert.load_hf(published)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert tokenizers.load(tmp_path / 'tuned').fingerprint == tokenizers.load(
      run).fingerprint
  wrong = _command('train', f'--config={run}/config.json', f'--workdir={run}')
  assert wrong.returncode == 2
  assert f'--config.train.init_from={run}' in wrong.stderr


def test_the_command_asks_for_what_it_needs(tmp_path):
  for flags, message in (
      ((), '--workdir=... and one of'),
      (('--from_hf=a', '--to_hf=b', '--workdir=c'), 'one of --from_hf=DIR'),
      ((f'--from_hf={tmp_path}', '--workdir=c'), 'is no safetensors checkp'),
  ):
    done = _command('convert', *flags)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
  assert not pathlib.Path('c').exists()
