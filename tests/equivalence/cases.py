"""What is compared: every recipe, and settings that no recipe has.

Settings have their old names, those of tag `base`.
"""

from __future__ import annotations

import dataclasses

# Makes any recipe small.
TINY = (
    'model.width=32', 'model.vocab_size=61', 'model.mixer.num_heads=2',
    'model.mixer.key_dim=8', 'model.mixer.value_dim=8', 'model.mixer.chunk=16',
    'model.attention.num_heads=2', 'model.attention.num_kv_heads=1',
    'model.attention.head_dim=8', 'model.mlp.hidden=24', 'model.moma.hidden=16',
    'data.seq_len=40', 'data.batch_size=2', 'optimizer.warmup_steps=2',
    # The first moment is then half the gradient, without rounding.
    'optimizer.b1=0.5',
    'mesh.fsdp=1',
)
RULES = (
    'linear', 'based', 'rebased', 'retention', 'lightning', 'decay', 'mamba2',
    'gla', 'hgrn2', 'gsa', 'delta', 'gated_delta', 'gated_delta_product', 'kda',
    'gated_delta_2', 'rwkv6', 'rwkv7', 'ttt_linear', 'titans',
)
RANKED = ('kda', 'gated_delta_2', 'rwkv7')
MOMA = ('dense', 'moe_1t1i', 'moe_8x', 'moe_4t4i', 'causal', 'mot', 'mod',
        'mod_moe_1t1i', 'mod_moe_4t4i')
SMALL = ('dense', 'moe_1t1i', 'moe_8x', 'moe_4t4i', 'threshold', 'token_choice',
         'upcycled', 'mot', 'mom')
RECALL = ('mom', 'single_kv', 'plain', 'expanded', 'keys', 'shared',
          'attention', 'hybrid')


@dataclasses.dataclass(frozen=True)
class Case:
  """A tiny model that is run by the old and the new code.

  Attributes:
    recipe: file in configs/, with its argument.
    overrides: settings beside TINY, by their old names.
    repeats: of the pattern of blocks.
    decodes: prefill and single steps are compared as well.
    quick: runs by default; others are slow tests.
    devices: of the mesh.
  """

  recipe: str
  overrides: tuple[str, ...] = ()
  repeats: int = 2
  decodes: bool = False
  quick: bool = False
  devices: int = 1


SECOND = ('train.stage=aux_router', 'train.init_from=elsewhere',
          'model.moma.router=aux_causal', 'model.depth.router=aux_causal')
MOM = 'recall:mixer=mom'
BOTH = 'quickstart'
CHOICE = 'moma_small:moe_4t4i'
MESH = ('data.batch_size=8', 'model.moma.hidden=16')


def _cases() -> dict[str, Case]:
  """By name. Rules and routers decode where they are introduced."""
  table = {
      'quickstart': Case(BOTH, decodes=True, quick=True),
      'mom_380m': Case('mom_380m'),
      'mom_1b3': Case('mom_1b3'),
      'mom_hybrid_380m': Case('mom_hybrid_380m', (
          'model.pattern=mom/mlp mom/mlp attention/mlp',), repeats=1),
      'mom_moma_1b4': Case('mom_moma_1b4', (
          'model.pattern=mom/moma mom/moma attention/moma',), repeats=1),
  }
  for rule in RULES:
    table[f'rules:{rule}'] = Case(
        f'rules:{rule}',
        ('model.mixer.gate_rank=8',) if rule in RANKED else (), decodes=True)
  for arm in RECALL:
    table[f'recall:{arm}'] = Case(
        f'recall:mixer={arm}', decodes=arm in ('hybrid', 'single_kv'),
        quick=arm in ('mom', 'attention'))
  for name in SMALL:
    table[f'moma_small:{name}'] = Case(
        f'moma_small:{name}', decodes=name in ('moe_4t4i', 'mot'),
        quick=name == 'moe_4t4i')
  for name in MOMA:
    table[f'moma_90m:{name}'] = Case(
        f'moma_90m:{name}', decodes=name == 'mod_moe_4t4i')
  for size in ('moma_435m', 'moma_1b4'):
    table[size] = Case(size)
  table |= {
      # The second stage.
      'second stage': Case(CHOICE, SECOND, decodes=True),
      'second stage of depth': Case('moma_90m:mod_moe_4t4i', SECOND),
      # Routers.
      **{
          f'memories by {router}': Case(
              MOM, (f'model.mixer.router={router}',), decodes=True)
          for router in ('softmax_topk_bias', 'token_choice', 'sigmoid_topk',
                         'softmax_topk_raw')
      },
      'experts by softmax_topk': Case(
          CHOICE, ('model.moma.router=softmax_topk', 'model.moma.top_k=2')),
      'experts by sequence': Case(
          CHOICE, ('model.moma.pool=sequence', 'model.moma.capacity=1.5')),
      'experts by threshold, shared ones': Case(
          'moma_small:threshold', ('model.moma.shared=1',), decodes=True),
      'uneven experts': Case(CHOICE, (
          'model.moma.experts=3,1', 'model.moma.router=token_choice',
          'model.moma.noise=True')),
      # Forms of the MoM layer.
      'both by modality': Case(
          BOTH, ('model.untied=True',), decodes=True),
      'one kv by modality': Case(
          BOTH, ('model.untied=True', 'model.mixer.single_kv_proj=True')),
      'two writes without a shared memory': Case(
          MOM, ('model.mixer.writes=2', 'model.mixer.shared=False')),
      'key heads, bias, ranks': Case('rules:gla', (
          'model.mixer.key_heads=1', 'model.mixer.conv_width=3',
          'model.mixer.conv_bias=True', 'model.mixer.low_ranks=4')),
      **{
          f'features {name}': Case('rules:linear', (
              f'model.mixer.feature_map={name}', 'model.mixer.normaliser=True',
              'model.mixer.key_dim=4'))
          for name in ('elu', 'relu', 'silu', 't2r', 'hedgehog', 'taylor',
                       'rebased')
      },
      'gate by its own, norm over all': Case(MOM, (
          'model.mixer.output_gate=own', 'model.mixer.output_norm=all',
          'model.mixer.norm_eps=1e-4')),
      'RWKV': Case('rules:rwkv7', (
          'model.pattern=mom/shift_mlp', 'model.norm=layer',
          'model.embed_norm=True', 'model.mixer.gate_rank=8',
          'model.channel_norm=post'), decodes=True),
      'mom under depth': Case(
          BOTH, ('model.pattern=depth/mom/moma mom/none',), decodes=True),
      'window': Case('recall:mixer=attention', ('model.attention.window=7',),
                     decodes=True),
      # Losses and the step.
      'micro-batches': Case(BOTH, (
          'train.accumulate=2', 'loss.balance_over=model', 'loss.router_z=1e-3',
          'loss.z_loss=1e-3', 'optimizer.ema=0.9',
          'optimizer.decay_embeddings=True')),
      'balance by sample': Case(MOM, ('loss.balance_over=sample',
                                      'optimizer.clip_norm=0')),
      'remat full': Case('mom_moma_1b4', (
          'model.pattern=mom/moma attention/moma', 'model.remat=full',
          'model.dtype=bfloat16')),
      # Eight devices.
      'mesh data': Case(BOTH, (*MESH, 'mesh.data=4', 'mesh.fsdp=2'), devices=8),
      'mesh owners': Case(
          BOTH, (*MESH, 'mesh.memory_expert=4', 'mesh.fsdp=2'), devices=8),
      'mesh owners over slices': Case(
          BOTH, (*MESH, 'mesh.expert_slice=2', 'mesh.memory_expert=2',
                 'mesh.slice=2'), devices=8),
      'mesh tensor': Case(
          BOTH, (*MESH, 'mesh.tensor=2', 'mesh.fsdp=4',), devices=8),
      'mesh context': Case(
          BOTH, (*MESH, 'mesh.context=2', 'mesh.tensor=2', 'mesh.fsdp=2'),
          devices=8),
      'mesh experts choose': Case(
          CHOICE, (*MESH, 'model.moma.pool=global', 'mesh.memory_expert=2',
                   'mesh.context=2'), devices=8),
      'mesh by modality': Case(
          BOTH, (*MESH, 'model.untied=True', 'mesh.fsdp=2',
                 'mesh.memory_expert=2', 'mesh.tensor=2'), devices=8),
      'mesh RWKV': Case('rules:rwkv7', (
          *MESH, 'model.pattern=mom/shift_mlp', 'model.mixer.gate_rank=8',
          'mesh.context=2', 'mesh.fsdp=2'), devices=8),
  }
  return table


CASES = _cases()
