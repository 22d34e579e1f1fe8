"""Stages of scripts/gpu_kit.sh that time rivals in PyTorch.

  python scripts/bench_torch.py --out=DIR --stage=kernels|models

fla's Triton ops, causal-conv1d, torch._grouped_mm and torch's attention on the
shapes of gpu_cases.py, and fla's MoM model. What is not installed, or refuses,
gives a row that says so. Times are triton.testing.do_bench's medians, which
empty the cache before each run; autotuning happens in the first call, untimed.

fla refuses gated backward passes on Hopper with Triton 3.4 to 3.7.0, where one
tile size is compiled wrongly. With heads of 128 and 256 another one is chosen:
the refusal is lifted there, said in the row, and gradients are compared with
float64 first; if they are wrong the row is absent.

Nothing of mom_jax is imported: no jax beside torch on one GPU.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json

import gpu_cases

CHECKED_TOKENS = 128  # of the comparison with float64
TOLERANCE = 4e-2


class Results:
  """Rows, appended as they come."""

  def __init__(self, folder: str):
    self.path = gpu_cases.results(folder)

  def add(self, **row) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with self.path.open('a') as file:
      file.write(json.dumps(row) + '\n')
    print(json.dumps(row), flush=True)


def version(*names: str) -> str:
  """Return name and version of the first distribution that is installed."""
  for name in names:
    try:
      return f'{name} {importlib.metadata.version(name)}'
    except importlib.metadata.PackageNotFoundError:
      continue
  return f'{names[0]}, not installed'


def clock(run) -> float:
  import triton.testing
  run()
  return triton.testing.do_bench(run, return_mode='median')


def draw(*shape):
  import torch
  return torch.randn(shape, device='cuda', dtype=torch.bfloat16)


def gated_delta_operands(B, T, H, D):
  """q, k, v, g, beta as bench_gpu.operands draws them."""
  import torch
  unit = lambda x: torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype)
  uniform = lambda: torch.rand(B, T, H, device='cuda')
  return (
      unit(draw(B, T, H, D)), unit(draw(B, T, H, D)), draw(B, T, H, D),
      -0.1 * uniform(), uniform())


def token_by_token(q, k, v, g, beta):
  """The gated delta rule in float64."""
  import torch
  q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
  B, T, H, D = q.shape
  state, out = q.new_zeros(B, H, D, D), []
  for t in range(T):
    state = state * g[:, t, :, None, None].exp()
    found = torch.einsum('bhk,bhkv->bhv', k[:, t], state)
    new = beta[:, t, :, None] * (v[:, t] - found)
    state = state + k[:, t, :, :, None] * new[:, :, None]
    out.append(torch.einsum('bhk,bhkv->bhv', q[:, t], state))
  return torch.stack(out, 1) * D**-0.5


def _gradient(run, args, weight):
  """[result, gradients] for the cotangent `weight`."""
  args = [x.detach().requires_grad_() for x in args]
  out = run(*args)
  out.backward(weight.to(out.dtype))
  return [out, *(x.grad for x in args)]


def timed(run, args, pass_) -> dict:
  """Milliseconds of the forward pass or of both."""
  if pass_ == gpu_cases.FORWARD:
    return dict(ms=clock(lambda: run(*args)))
  weight = draw(*run(*args).shape)
  return dict(ms=clock(lambda: _gradient(run, args, weight)))


def gated_delta_error(run, H, D) -> float:
  """Largest error of result and gradients, relative to their largest value."""
  args = gated_delta_operands(1, CHECKED_TOKENS, min(H, 2), D)
  weight = draw(*args[2].shape)
  got = _gradient(run, args, weight)
  want = _gradient(token_by_token, [x.double() for x in args], weight)
  return max(
      float((x.double() - y).abs().max() / y.abs().max())
      for x, y in zip(got, want))


def lift_guard() -> str:
  """Lets fla run gated backward passes; says so if it had refused."""
  from fla.ops.common import chunk_o
  if getattr(chunk_o, 'TRITON_ABOVE_3_7_1', True):
    return ''
  chunk_o.TRITON_ABOVE_3_7_1 = True
  return ', guard off'


def gated_delta(case, pass_):
  from fla.ops.gated_delta_rule import chunk_gated_delta_rule
  run = lambda *args: chunk_gated_delta_rule(*args)[0]
  args = gated_delta_operands(**case.shape)
  if pass_ == gpu_cases.FORWARD:
    return timed(run, args, pass_)
  who = FLA + lift_guard()
  wrong = gated_delta_error(run, case.shape['H'], case.shape['D'])
  if not wrong < TOLERANCE:
    raise ArithmeticError(f'{who}: gradients are wrong by {wrong}')
  return dict(who=who, error=wrong) | timed(run, args, pass_)


def gla(case, pass_):
  from fla.ops.gla import chunk_gla
  import torch
  B, T, H, D = (case.shape[name] for name in 'BTHD')
  q, k, v, *_ = gated_delta_operands(B, T, H, D)
  g = -0.1 * torch.rand(B, T, H, D, device='cuda')
  return timed(lambda *args: chunk_gla(*args)[0], (q, k, v, g), pass_)


def short_convolution(case, pass_):
  from fla.modules import ShortConvolution
  import torch
  B, T, F, W = (case.shape[name] for name in 'BTFW')
  made = ShortConvolution(
      F, W, activation='silu', backend='triton', device='cuda',
      dtype=torch.bfloat16)
  return timed(lambda x: made(x)[0], (draw(B, T, F),), pass_)


def causal_conv1d(case, pass_):
  from causal_conv1d import causal_conv1d_fn
  B, T, F, W = (case.shape[name] for name in 'BTFW')
  run = lambda x, w: causal_conv1d_fn(
      x.transpose(1, 2), w, activation='silu').transpose(1, 2)
  return timed(run, (draw(B, T, F), draw(F, W) / W), pass_)


def decode(case, pass_):
  del pass_
  from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
  import torch
  N, H, D = (case.shape[name] for name in 'NHD')
  q, k, v, g, beta = gated_delta_operands(N, 1, H, D)
  state = torch.randn(N, H, D, D, device='cuda')
  return dict(ms=clock(lambda: fused_recurrent_gated_delta_rule(
      q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)))


def grouped_matmul(case, pass_):
  import torch
  R, D, F, G = (case.shape[name] for name in 'RDFG')
  share = torch.distributions.Dirichlet(torch.full((G,), 20.0)).sample()
  ends = (share.cumsum(0) * R).round().int().cuda()
  ends[-1] = R
  dy, w, N = draw(R, F), draw(G, D, F), case.shape.get('N', R)
  x, rows = draw(N, D), torch.randint(N, (R,), device='cuda')
  take = (lambda: x) if N == R else (lambda: x[rows])
  multiply = functools.partial(torch._grouped_mm, offs=ends)
  return dict(ms=clock({
      gpu_cases.FORWARD: lambda: multiply(take(), w),
      gpu_cases.DX: lambda: multiply(dy, w.transpose(1, 2)),
      gpu_cases.DW: lambda: multiply(take().t(), dy),
  }[pass_]))


def attention(case, pass_):
  import torch
  B, T, H, D = (case.shape[name] for name in 'BTHD')
  args = [draw(B, H, T, D) for _ in range(3)]
  run = functools.partial(
      torch.nn.functional.scaled_dot_product_attention, is_causal=True)
  return timed(run, args, pass_)


FLA = version('fla-core', 'flash-linear-attention')
OPS = (  # operation, who, what times a pass
    ('gated_delta', FLA, gated_delta),
    ('gla', FLA, gla),
    ('conv', FLA, short_convolution),
    ('conv', version('causal-conv1d'), causal_conv1d),
    ('decode', FLA, decode),
    ('grouped_matmul', f'torch._grouped_mm, {version("torch")}',
     grouped_matmul),
    ('gathered_matmul', f'indexing, torch._grouped_mm, {version("torch")}',
     grouped_matmul),
    ('attention', f'attention of {version("torch")}', attention))


def layer(tokens: int) -> dict:
  """Forward and backward of fla's MoM layer of gpu_cases.LAYER, one row."""
  from fla.layers import MomAttention
  lift_guard()
  shape = gpu_cases.LAYER
  made = MomAttention(
      hidden_size=shape['D'], num_heads=shape['H'], head_dim=shape['K'],
      expand_v=1, num_memories=shape['M'], topk=shape['A'], shared_mem=True,
      layer_idx=0).cuda().bfloat16()
  x = draw(1, tokens, shape['D']).requires_grad_()
  weight = draw(1, tokens, shape['D'])
  return dict(ms=clock(lambda: (made(x)[0] * weight).sum().backward()))


def model_step(length: int) -> dict:
  """A training step of fla's MoM model of the size of configs/mom_380m.py."""
  from fla.models import MomConfig, MomForCausalLM
  import torch
  lift_guard()
  model = MomForCausalLM(MomConfig(
      hidden_size=1024, num_hidden_layers=24, num_heads=4, head_dim=256,
      intermediate_size=2048, vocab_size=32000, num_memories=4, topk=2,
      shared_mem=True, tie_word_embeddings=True,
      max_position_embeddings=length)).cuda()
  adam = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  ids = torch.randint(
      32000, (max(1, gpu_cases.TOKENS // length), length), device='cuda')

  def step():
    with torch.autocast('cuda', torch.bfloat16):
      loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    adam.step()
    adam.zero_grad()

  torch.cuda.reset_peak_memory_stats()
  ms = clock(step)
  return {'ms': ms, 'tokens/s': 1e3 * ids.numel() / ms,
          'bytes': torch.cuda.max_memory_allocated()}


def attempt(results: Results, name: str, pass_: str, who: str, run) -> None:
  """A row; an exception becomes the reason of its absence."""
  row = {'case': name, 'pass': pass_, 'who': who, 'clock': 'events'}
  try:
    row |= run()
  except Exception as e:
    row |= dict(absent=f'{type(e).__name__}: {str(e)[:200]}')
  results.add(**row)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--out', required=True)
  parser.add_argument('--stage', required=True, choices=('kernels', 'models'))
  args = parser.parse_args()
  results = Results(args.out)
  if args.stage == 'models':
    who = version('flash-linear-attention')
    attempt(results, gpu_cases.LAYER_NAME, gpu_cases.BOTH, who,
            lambda: layer(gpu_cases.TOKENS))
    for length in gpu_cases.LENGTHS:
      attempt(results, f'training mom_380m T={length}', 'step', who,
              functools.partial(model_step, length))
    return
  for case in gpu_cases.CASES:
    for op, who, measure in OPS:
      for pass_ in case.passes if op == case.op else ():
        attempt(results, case.name, pass_, who,
                functools.partial(measure, case, pass_))


if __name__ == '__main__':
  main()
