"""All settings of mom_jax: one field each, with default, unit and check.

`Config()` fits a laptop. A recipe in `configs/` starts from
`to_config_dict(Config())` and sets what differs; `load` reads a recipe, applies
overrides such as `model.mixer.num_memories=8` and checks the result.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import os
import traceback
import types
import typing
from typing import Any

import ml_collections


class UserError(ValueError):
  """An input that cannot be used; the message names the cause and the fix.

  It is one line, whatever the input that it quotes: characters that would end
  the line or move the cursor are shown as Python writes them.
  """

  def __init__(self, message: str):
    super().__init__(''.join(
        c if c.isprintable() else repr(c)[1:-1] for c in message))


@dataclasses.dataclass(frozen=True)
class Check:
  """A condition on one value and its wording, 'must be ...'."""

  text: str
  holds: Callable[[Any], bool]


POSITIVE = Check('must be above 0', lambda x: x > 0)
NOT_NEGATIVE = Check('must be 0 or more', lambda x: x >= 0)
FRACTION = Check('must lie in [0, 1]', lambda x: 0 <= x <= 1)
BELOW_ONE = Check('must lie in [0, 1)', lambda x: 0 <= x < 1)
LIMIT = 2**32  # whole numbers stay below it in size
SEED = Check('must lie in [0, 2**32)', lambda x: 0 <= x < LIMIT)
POWER_OF_TWO = Check(
    'must be a power of two', lambda x: x > 0 and x & (x - 1) == 0
)


def one_of(*names: str) -> Check:
  return Check('must be one of ' + ', '.join(names), lambda x: x in names)


def setting(default: Any, doc: str, check: Check | None = None) -> Any:
  """A dataclass field with its documentation and check."""
  return dataclasses.field(default=default, metadata=dict(doc=doc, check=check))


def _part(cls: type) -> Any:
  return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(frozen=True)
class Mixer:
  """Settings of the MoM token mixer.

  (Elsewhere "mixer" is whichever token mixer a block has.)
  """

  rule: str = setting('gated_delta', 'memory-update rule, a key of rules.RULES')
  num_memories: int = setting(4, 'number of routed memories M', POSITIVE)
  top_k: int = setting(2, 'memories that each token goes to', POSITIVE)
  shared: bool = setting(True, 'add a memory that every token goes to')
  single_kv_proj: bool = setting(
      False, 'one set of key, value and gate projections for all memories'
  )
  router: str = setting(
      'softmax_topk', 'router of the memories, a key of ROUTERS',
  )
  balance_rate: float = setting(
      0.001, 'step size of the balance bias; routers softmax_topk_bias and'
      ' token_choice', FRACTION,
  )
  num_heads: int = setting(2, 'number of heads H', POSITIVE)
  key_heads: int = setting(
      0, 'number of query/key heads; each is shared by num_heads / key_heads'
      ' value heads (0 = num_heads)', NOT_NEGATIVE,
  )
  key_dim: int = setting(16, 'size of a query or key per head', POSITIVE)
  value_dim: int = setting(16, 'size of a value per head', POSITIVE)
  num_householder: int = setting(
      1, 'updates of a memory per token, each with its own key and value',
      POSITIVE,
  )
  conv_width: int = setting(
      4, 'width of the short convolution; 0 = no convolution and no SiLU after'
      ' it', NOT_NEGATIVE,
  )
  conv_bias: bool = setting(False, 'add a bias to the short convolution')
  low_ranks: tuple[int, ...] = setting(
      (), "ranks of the rule's low-rank gate projections, in its order"
      ' (() = as published)'
  )
  feature_map: str = setting(
      'identity', 'feature map of queries and keys, a key of FEATURE_MAPS;'
      ' additive rules only'
  )
  normaliser: bool = setting(
      False, 'divide outputs by the sum of their weights; additive rules only'
  )
  output_norm: str = setting(
      'head', 'norm of the output: head (RMS per head), all (RMS over all'
      ' heads), group (mean and variance per head) or none',
      one_of('head', 'all', 'group', 'none'),
  )
  norm_eps: float = setting(
      0.0, 'epsilon of output_norm (0 = model.norm_eps)', NOT_NEGATIVE
  )
  output_gate: str = setting(
      'silu', 'gate on the normalised output: silu, sigmoid, inner_sigmoid'
      ' (between the two factors of gate_rank) or none; before the norm:'
      ' silu_before_norm, or self_silu (SiLU of the output itself)',
      one_of('silu', 'sigmoid', 'inner_sigmoid', 'none', 'silu_before_norm',
             'self_silu'),
  )
  gate_rank: int = setting(
      0, "rank of the output gate's projection (0 = full matrix)", NOT_NEGATIVE,
  )
  chunk: int = setting(32, 'tokens per chunk of the recurrence', POWER_OF_TWO)
  backend: str = setting(
      'auto', 'backend of chunk_memory (auto = the best one)',
  )


@dataclasses.dataclass(frozen=True)
class Attention:
  """The causal softmax-attention token mixer."""

  num_heads: int = setting(4, 'number of query heads', POSITIVE)
  num_kv_heads: int = setting(4, 'number of key/value heads', POSITIVE)
  head_dim: int = setting(32, 'size of each head', POSITIVE)
  qk_norm: bool = setting(True, 'RMS-normalise queries and keys per head')
  rope_theta: float = setting(10000.0, 'base of the rotary embedding', POSITIVE)
  window: int = setting(
      0, 'tokens that each token attends to, itself included (0 = all before)',
      NOT_NEGATIVE,
  )
  backend: str = setting(
      'auto', 'implementation: auto, xla or cudnn',
      one_of('auto', 'xla', 'cudnn'),
  )


@dataclasses.dataclass(frozen=True)
class Mlp:
  """The dense channel mixers: SwiGLU and shift_mlp."""

  hidden: int = setting(384, 'hidden width F', POSITIVE)


@dataclasses.dataclass(frozen=True)
class Moma:
  """The MoMa channel mixer: SwiGLU experts in modality groups."""

  experts: tuple[int, ...] = setting(
      (4, 4), 'number of experts per modality; a single number is one'
      ' modality group for all'
  )
  shared: int = setting(
      0, 'additional experts that every token uses with weight 1', NOT_NEGATIVE,
  )
  hidden: int = setting(256, 'hidden width F of each expert', POSITIVE)
  router: str = setting(
      'token_choice', 'router of the experts, a key of ROUTERS',
  )
  top_k: int = setting(
      1, 'experts per token, with a router by which tokens pick experts'
      ' (token_choice, softmax_topk, ...)', POSITIVE,
  )
  capacity: float = setting(
      1.0, 'mean number of experts per token, with a router by which experts'
      ' pick tokens (expert_choice, threshold, ...)', POSITIVE,
  )
  pool: str = setting(
      'sequence', 'pool of tokens that compete in expert_choice: those of a'
      ' sequence, of a device, or of all devices (global)',
      one_of('sequence', 'device', 'global'),
  )
  noise: bool = setting(False, 'add Gumbel-sigmoid noise in training')
  balance_rate: float = setting(
      0.001, 'step size of the balance bias; routers softmax_topk_bias and'
      ' token_choice', FRACTION,
  )
  threshold_rate: float = setting(
      0.01, 'step size of the thresholds; routers expert_choice, threshold and'
      ' aux_causal', FRACTION,
  )
  backend: str = setting(
      'auto', 'backend of grouped_matmul (auto = the best one)',
  )


@dataclasses.dataclass(frozen=True)
class Mod:
  """Mixture-of-Depths: the blocks that `mod/` marks in the pattern."""

  capacity: float = setting(
      0.25, "fraction of a sequence's tokens that the block processes", POSITIVE
  )
  router: str = setting(
      'expert_choice', 'router of the block: expert_choice or threshold; for a'
      ' trained model also aux_causal or expert_choice_oracle',
      one_of('expert_choice', 'threshold', 'aux_causal',
             'expert_choice_oracle'),
  )
  threshold_rate: float = setting(0.01, 'step size of the threshold', FRACTION)


@dataclasses.dataclass(frozen=True)
class Model:
  """The language model."""

  vocab_size: int = setting(772, 'size of the joint vocabulary W', POSITIVE)
  width: int = setting(128, 'width D of the residual stream', POSITIVE)
  num_layers: int = setting(4, 'number of blocks L', POSITIVE)
  pattern: str = setting(
      'mom/moma', 'blocks, each token_mixer/channel_mixer, repeated up to'
      ' num_layers; token mixers mom, attention; channel mixers moma, mlp,'
      ' shift_mlp (of RWKV), none; mod/ in front makes a Mixture-of-Depths'
      ' block',
  )
  modalities: tuple[str, ...] = setting(
      ('text', 'image'), 'names of the modality ids 0, 1, ...'
  )
  modality_specific: bool = setting(
      False, 'each modality has its own projections in token mixers and its own'
      ' norms in blocks (Mixture-of-Transformers)'
  )
  image_side: int = setting(
      8, 'tokens per row and column of an image, which get position embeddings'
      ' (0 = none)', NOT_NEGATIVE,
  )
  mixer_norm: str = setting(
      'pre', 'norm before the token mixer (pre) or on its output (post)',
      one_of('pre', 'post'),
  )
  channel_norm: str = setting(
      'pre', 'norm before the channel mixer (pre) or on its output (post)',
      one_of('pre', 'post'),
  )
  norm: str = setting(
      'rms', 'norm of the residual stream: rms, or layer (mean and variance,'
      ' with a bias)', one_of('rms', 'layer'),
  )
  embed_norm: bool = setting(False, 'normalise the embeddings too')
  norm_eps: float = setting(1e-6, 'epsilon of every norm', POSITIVE)
  tie_embeddings: bool = setting(
      True, 'the output projection is the embedding table')
  dtype: str = setting(
      'float32', 'data type of activations', one_of('float32', 'bfloat16')
  )
  remat: str = setting(
      'full', 'what the backward pass recomputes: none, dots or full',
      one_of('none', 'dots', 'full'),
  )
  mixer: Mixer = _part(Mixer)
  attention: Attention = _part(Attention)
  mlp: Mlp = _part(Mlp)
  moma: Moma = _part(Moma)
  mod: Mod = _part(Mod)

  @property
  def unit(self) -> tuple[tuple[str, str], ...]:
    """The repeated blocks: ((token mixer, channel mixer), ...)."""
    return tuple(
        tuple(block.removeprefix(MOD).split('/'))
        for block in self.pattern.split()
    )

  @property
  def mod_blocks(self) -> tuple[bool, ...]:
    """Mark the Mixture-of-Depths blocks of the unit."""
    return tuple(block.startswith(MOD) for block in self.pattern.split())

  @property
  def repeats(self) -> int:
    return self.num_layers // len(self.unit)

  @property
  def num_modality_copies(self) -> int:
    """Copies of modality-specific parameters; 0 where all share them."""
    return len(self.modalities) if self.modality_specific else 0


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text and image tokens of the joint vocabulary."""

  text: str = setting(
      'bytes',
      "'bytes', 'bpe:SIZE' (fitted on the training texts), 'symbols:SIZE' (of"
      ' synthetic tasks), a tokenizers .json or a SentencePiece .model file',
  )
  image: str = setting(
      'patch_vq',
      "'patch_vq' (fitted on the training images), a .npz codebook, or"
      " 'package.module:function' that returns an ImageTokenizer",
  )
  image_size: int = setting(
      16, 'height and width of an image in pixels', POSITIVE,
  )
  patch: int = setting(
      2, 'height and width in pixels of a patch, which is one token', POSITIVE)
  codes: int = setting(512, 'size of the image codebook', POSITIVE)


@dataclasses.dataclass(frozen=True)
class Data:
  """Sources, packing and batches."""

  sources: tuple[str, ...] = setting(
      ('openmoji', 'kjv'),
      'sources of documents, each openmoji, kjv, jsonl:PATH, parquet:PATH,'
      ' array_record:GLOB or synthetic:TASK (data/synthetic.py), with settings'
      ' as in synthetic:mqar:pairs=8:length=64',
  )
  weights: tuple[float, ...] = setting(
      (10.0, 1.0), 'relative numbers of tokens drawn from the sources'
  )
  image_folder: str = setting(
      '', 'folder from which the image paths in documents start and which they'
      " cannot leave ('' = that of the file)"
  )
  tokenizer: Tokenizer = _part(Tokenizer)
  seq_len: int = setting(512, 'tokens per sequence T', POSITIVE)
  batch_size: int = setting(
      4, 'sequences per step B, over all devices', POSITIVE)
  image_first: float = setting(
      0.5, 'fraction of pairs whose image comes before its caption', FRACTION
  )
  validation: float = setting(
      0.05, 'fraction of documents held out, chosen by hash', BELOW_ONE
  )
  readers: int = setting(
      1, 'parts that the documents are divided into, each read in its own'
      ' order; a multiple of the processes of the run', POSITIVE
  )
  workers: int = setting(
      0, 'processes that read a data shard (0 = the training process reads)',
      NOT_NEGATIVE,
  )
  allow_changed: bool = setting(
      False, 'resume a run although its documents have changed, at the same'
      ' position of the new ones'
  )
  cache: str = setting(
      '~/.cache/mom_jax', 'folder for rendered images, fitted codebooks and'
      ' compiled programs'
  )
  cache_compiled: bool = setting(
      True, 'keep compiled programs in data.cache, so that later starts of any'
      ' command do not compile them again'
  )


@dataclasses.dataclass(frozen=True)
class Loss:
  """Terms of the training loss."""

  z_loss: float = setting(
      0.0, 'weight of the z-loss, the mean of log(Z)^2', NOT_NEGATIVE)
  balance: float = setting(
      1e-2, 'weight of the balance loss of memory routers', NOT_NEGATIVE
  )
  balance_over: str = setting(
      'layer', 'scope of the balance loss: each layer, all layers pooled'
      ' (model) or each sample in each layer (sample)',
      one_of('layer', 'model', 'sample'),
  )
  router_z: float = setting(
      0.0, 'weight of the z-loss of memory routers', NOT_NEGATIVE
  )
  modality_weights: tuple[float, ...] = setting(
      (1.0, 1.0), 'weight of target tokens of each modality'
  )
  input_noise: tuple[float, ...] = setting(
      (), 'fraction of the input tokens of each modality that are replaced by'
      ' random ones of the batch in training; targets stay (() = none)'
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW and its schedule."""

  learning_rate: float = setting(4e-3, 'peak learning rate', POSITIVE)
  schedule: str = setting(
      'cosine', 'after warm-up: cosine, linear, wsd or constant',
      one_of('cosine', 'linear', 'wsd', 'constant'),
  )
  warmup_steps: int = setting(30, 'steps of linear warm-up', NOT_NEGATIVE)
  decay_fraction: float = setting(
      0.2, 'wsd: fraction of the steps that decay', FRACTION
  )
  end_ratio: float = setting(
      0.1, 'final learning rate / peak learning rate', FRACTION
  )
  b1: float = setting(0.9, 'decay of the first moment', BELOW_ONE)
  b2: float = setting(0.95, 'decay of the second moment', BELOW_ONE)
  eps: float = setting(
      1e-8, 'added to the square root of the second moment', POSITIVE)
  weight_decay: float = setting(0.01, 'decoupled weight decay', NOT_NEGATIVE)
  decay_embeddings: bool = setting(False, 'decay embeddings too')
  clip_norm: float = setting(
      1.0, 'maximum global norm of the gradient (0 = no clipping)', NOT_NEGATIVE
  )
  ema: float = setting(
      0.0, 'decay of the moving average of parameters that evaluation uses'
      ' (0 = none)', BELOW_ONE,
  )


@dataclasses.dataclass(frozen=True)
class Train:
  """The training run."""

  stage: str = setting(
      'main', 'stage of training: main trains the model, aux_router the'
      ' auxiliary routers of a trained model', one_of('main', 'aux_router'),
  )
  init_from: str = setting(
      '', 'workdir of a run to start from, with its parameters and vocabulary;'
      ' for stage aux_router a model trained with expert_choice'
  )
  steps: int = setting(1200, 'number of optimizer steps', NOT_NEGATIVE)
  grad_accum_steps: int = setting(
      1, 'micro-batches per step, whose gradients are added; a divisor of'
      ' batch_size', POSITIVE,
  )
  seed: int = setting(
      0, 'seed of parameters, order of the data and noise', SEED)
  log_every: int = setting(10, 'steps between lines of metrics', POSITIVE)
  eval_every: int = setting(
      300, 'steps between validations (0 = only at the end)', NOT_NEGATIVE
  )
  eval_batches: int = setting(16, 'batches per validation', POSITIVE)
  max_nonfinite_steps: int = setting(
      20, 'the run stops after this many non-finite steps in a row', POSITIVE
  )
  profile: tuple[int, ...] = setting(
      (), 'first and last step of a profiler trace, e.g. (20, 25) (() = none)'
  )
  writers: tuple[str, ...] = setting(
      ('jsonl', 'tensorboard'), 'writers of metrics: jsonl, tensorboard, wandb'
  )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """Checkpoints in the workdir."""

  every: int = setting(
      300, 'steps between checkpoints; the last step always has one', POSITIVE)
  keep: int = setting(2, 'number of newest checkpoints kept', POSITIVE)
  keep_every: int = setting(
      0, 'checkpoints at multiples of this step are kept for good (0 = none)',
      NOT_NEGATIVE,
  )


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices: sizes of the mesh axes and how arrays lie on them."""

  dcn_data: int = setting(
      1, 'slices of a pod that split the batch, over the slow network (DCN)')
  dcn_expert: int = setting(
      1, 'slices of a pod that split memories and experts too, over the DCN')
  data: int = setting(-1, 'replicas of the parameters; -1 takes what is left')
  fsdp: int = setting(1, 'devices that share one copy of the parameters')
  expert: int = setting(
      1, 'devices of a slice that share the memories and experts of a layer')
  tensor: int = setting(1, 'devices that share the heads and hidden width')
  context: int = setting(1, 'devices that share a sequence')
  strategy: str = setting('fsdp', 'a key of STRATEGIES in sharding.py')

  @property
  def sizes(self) -> dict[str, int]:
    """Sizes of the mesh axes, by name."""
    sizes = dataclasses.asdict(self)
    del sizes['strategy']
    return sizes


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Sampling of tokens: flags of the command generate, not part of a run."""

  max_new_tokens: int = setting(256, 'maximum number of new tokens', POSITIVE)
  temperature: float = setting(
      0.8, 'divisor of the logits (0 = greedy)', NOT_NEGATIVE,
  )
  top_k: int = setting(
      0, 'sample from the k likeliest tokens (0 = all)', NOT_NEGATIVE
  )
  top_p: float = setting(
      0.95, 'sample from the fewest tokens with this total probability',
      FRACTION,
  )
  min_p: float = setting(
      0.0, 'drop tokens less likely than this fraction of the likeliest',
      FRACTION,
  )
  guidance: float = setting(
      1.0, 'classifier-free guidance of images by the text before them (1 ='
      ' none); takes twice the work', NOT_NEGATIVE,
  )
  seed: int = setting(0, 'seed of the samples', SEED)


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  model: Model = _part(Model)
  data: Data = _part(Data)
  loss: Loss = _part(Loss)
  optimizer: Optimizer = _part(Optimizer)
  train: Train = _part(Train)
  checkpoint: Checkpoint = _part(Checkpoint)
  mesh: Mesh = _part(Mesh)


MIXERS = ('mom', 'attention')
CHANNELS = ('moma', 'mlp', 'shift_mlp', 'none')
# Routers of exactly `top_k` experts or memories per token.
TOKEN_CHOICE = (
    'softmax_topk', 'softmax_topk_raw', 'softmax_topk_bias', 'sigmoid_topk',
    'token_choice')
MOD = 'mod/'  # before a block of the pattern
IMAGE = 'image'  # the modality whose tokens lie in rows and columns


def validate(cfg: Config) -> Config:
  """Return `cfg`, or raise `UserError` with key, value, rule and fix."""
  check_each(cfg, 'config.')
  _validate_model(cfg.model)
  _validate_stage(cfg)
  _validate_data(cfg.data, cfg.train)
  _validate_loss(cfg.loss, cfg.model.modalities)
  _validate_train(cfg.train)
  _validate_mesh(cfg.mesh)
  return cfg


def _validate_data(data: Data, train: Train) -> None:
  if len(data.sources) != len(data.weights) or not data.sources:
    raise UserError(
        f'config.data.weights={data.weights} needs one weight for each of the'
        f' {len(data.sources)} data.sources {data.sources}.'
    )
  if min(data.weights) <= 0:
    raise UserError(
        f'config.data.weights={data.weights} must all be above 0; leave a'
        ' source out of data.sources instead.'
    )
  if data.tokenizer.image_size % data.tokenizer.patch:
    raise UserError(
        f'config.data.tokenizer.patch={data.tokenizer.patch} must divide'
        f' image_size={data.tokenizer.image_size}.'
    )
  if data.batch_size % data.readers:
    raise UserError(
        f'config.data.readers={data.readers} must divide'
        f' data.batch_size={data.batch_size}; each reader yields equally many'
        ' sequences.'
    )
  if data.batch_size % train.grad_accum_steps:
    raise UserError(
        f'config.train.grad_accum_steps={train.grad_accum_steps} must divide'
        f' data.batch_size={data.batch_size}.'
    )


def _validate_loss(loss: Loss, modalities: tuple[str, ...]) -> None:
  noise = loss.input_noise
  if noise and (len(noise) != len(modalities)
                or not all(0 <= fraction <= 1 for fraction in noise)):
    raise UserError(
        f'config.loss.input_noise={noise} needs one fraction between 0 and 1'
        f' for each of the {len(modalities)} model.modalities'
        f' {modalities}; () replaces none.'
    )
  if len(loss.modality_weights) != len(modalities):
    raise UserError(
        f'config.loss.modality_weights={loss.modality_weights} needs one'
        f' weight for each of model.modalities={modalities}.'
    )


def _validate_train(train: Train) -> None:
  if train.profile and (len(train.profile) != 2 or
                        not 0 < train.profile[0] <= train.profile[1]):
    raise UserError(
        f'config.train.profile={train.profile} must be (first, last) step with'
        ' 0 < first <= last, or () for no trace.'
    )
  unknown = set(train.writers) - {'jsonl', 'tensorboard', 'wandb'}
  if unknown:
    raise UserError(
        f'config.train.writers={train.writers} has unknown'
        f' {sorted(unknown)}; known: jsonl, tensorboard, wandb.'
    )


def _validate_mesh(mesh: Mesh) -> None:
  for axis in ('data', 'fsdp'):
    size = getattr(mesh, axis)
    if size != -1 and size < 1:
      raise UserError(
          f'config.mesh.{axis}={size} must be above 0, or -1 for the devices'
          ' that are left.'
      )
  if mesh.data == mesh.fsdp == -1:
    raise UserError(
        'config.mesh.data=-1 and config.mesh.fsdp=-1 cannot both be inferred;'
        ' set one of them.'
    )


def check_each(values: Any, prefix: str) -> None:
  """Raise UserError for a setting that fails its own check."""
  for key, value, field in settings(values):
    check = field.metadata['check']
    numbers = value if isinstance(value, tuple) else (value,)
    if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
      raise UserError(
          f'{prefix}{key}={value!r} must be finite; {field.metadata["doc"]}.')
    if any(isinstance(x, int) and abs(x) >= LIMIT for x in numbers):
      raise UserError(
          f'{prefix}{key}={value!r} must be below 2**32 in size;'
          f' {field.metadata["doc"]}.')
    if check is not None and not check.holds(value):
      raise UserError(
          f'{prefix}{key}={value!r} {check.text}; {field.metadata["doc"]}.'
      )


def _validate_model(model: Model) -> None:
  """Check the settings of a model against each other."""
  _validate_pattern(model)
  if model.num_layers % len(model.unit):
    raise UserError(
        f'config.model.num_layers={model.num_layers} must be a multiple of the'
        f' {len(model.unit)} blocks in model.pattern={model.pattern!r}.'
    )
  if model.image_side and IMAGE not in model.modalities:
    raise UserError(
        f'config.model.image_side={model.image_side} gives image tokens'
        f' positions, but {IMAGE!r} is none of'
        f' model.modalities={model.modalities}; set it to 0.'
    )
  _validate_mixer(model.mixer)
  attention = model.attention
  if attention.num_heads % attention.num_kv_heads:
    raise UserError(
        f'config.model.attention.num_kv_heads={attention.num_kv_heads} must'
        f' divide num_heads={attention.num_heads}.'
    )
  if attention.head_dim % 2:
    raise UserError(
        f'config.model.attention.head_dim={attention.head_dim} must be even;'
        ' the rotary embedding rotates pairs.'
    )
  if any(model.mod_blocks) and model.mod.capacity > 1:
    raise UserError(
        f'config.model.mod.capacity={model.mod.capacity} must lie in (0,'
        ' 1]; a block works on no more tokens than there are.'
    )
  if any(channel == 'moma' for _, channel in model.unit):
    _validate_moma(model)


def _validate_pattern(model: Model) -> None:
  blocks = model.pattern.split()
  if not blocks:
    raise UserError(
        "config.model.pattern='' names no block; write mixer/channel pairs"
        " such as 'mom/moma mom/mlp'."
    )
  for text in blocks:
    block = text.removeprefix(MOD).split('/')
    if len(block) != 2 or block[0] not in MIXERS or block[1] not in CHANNELS:
      raise UserError(
          f'config.model.pattern={model.pattern!r} has the block'
          f' {text!r}; a block is token_mixer/channel_mixer, after'
          f' mod/ or not, with token mixers {", ".join(MIXERS)} and channel'
          f' mixers {", ".join(CHANNELS)}.'
      )


def _validate_mixer(mixer: Mixer) -> None:
  if mixer.top_k > mixer.num_memories:
    raise UserError(
        f'config.model.mixer.top_k={mixer.top_k} exceeds'
        f' num_memories={mixer.num_memories}; lower top_k or add memories.'
    )
  if mixer.key_heads and mixer.num_heads % mixer.key_heads:
    raise UserError(
        f'config.model.mixer.key_heads={mixer.key_heads} must divide'
        f' num_heads={mixer.num_heads}; 0 means num_heads.'
    )
  if mixer.conv_bias and not mixer.conv_width:
    raise UserError(
        'config.model.mixer.conv_bias=True needs a short convolution; set'
        ' conv_width above 0.'
    )
  if mixer.output_gate == 'inner_sigmoid' and not mixer.gate_rank:
    raise UserError(
        "config.model.mixer.output_gate='inner_sigmoid' is applied between"
        ' the factors of a low-rank projection; set gate_rank, e.g. to 128.'
    )


def _validate_stage(cfg: Config) -> None:
  """Check that auxiliary routers are trained after the model, not with it."""
  model, train = cfg.model, cfg.train
  routers = {}
  if any(channel == 'moma' for _, channel in model.unit):
    routers['moma'] = model.moma.router
  if any(model.mod_blocks):
    routers['mod'] = model.mod.router
  if train.stage == 'main':
    for part, name in routers.items():
      if name in ('aux_causal', 'expert_choice_oracle'):
        raise UserError(
            f'config.model.{part}.router={name!r} is for a model that is'
            ' trained already; train with expert_choice, then its auxiliary'
            ' routers with config.train.stage=aux_router.'
        )
    return
  if not train.init_from:
    raise UserError(
        "config.train.stage='aux_router' needs the model whose routers it"
        ' trains; set config.train.init_from to the workdir of its run.'
    )
  if not {'expert_choice', 'aux_causal'} & set(routers.values()):
    raise UserError(
        f"config.train.stage='aux_router' trains routers that replace"
        f' expert_choice, which no router of this model is ({routers}); train'
        ' with config.train.stage=main alone.'
    )


def _validate_moma(model: Model) -> None:
  moma = model.moma
  mixed = len(moma.experts) == 1
  if not mixed and len(moma.experts) != len(model.modalities) or min(
      moma.experts) < 1:
    raise UserError(
        f'config.model.moma.experts={moma.experts} needs one positive count'
        f' for each of model.modalities={model.modalities}, or one count for'
        ' all of them together.'
    )
  by_token = moma.router in TOKEN_CHOICE
  if by_token and moma.top_k > min(moma.experts):
    raise UserError(
        f'config.model.moma.top_k={moma.top_k} exceeds the smallest'
        f' modality group of moma.experts={moma.experts}; lower top_k or add'
        ' experts.'
    )
  if not by_token and max(moma.experts) == 1 and moma.capacity != 1:
    raise UserError(
        f'config.model.moma.capacity={moma.capacity} has no effect with one'
        ' expert a modality, which takes every token; set it to 1 or add'
        ' experts.'
    )
  if moma.noise and moma.router == 'threshold':
    raise UserError(
        'config.model.moma.noise=True makes thresholds that fit noisy scores'
        ' and not those of inference; set it to False or choose another'
        ' router.'
    )


def settings(cfg: Any, prefix: str = '') -> Iterator[
    tuple[str, Any, dataclasses.Field]
]:
  """Yield (dotted key, value, field) of every setting."""
  for field in dataclasses.fields(cfg):
    value = getattr(cfg, field.name)
    if dataclasses.is_dataclass(value):
      yield from settings(value, f'{prefix}{field.name}.')
    else:
      yield prefix + field.name, value, field


def to_config_dict(cfg: Config) -> ml_collections.ConfigDict:
  """Return the settings as a mutable, locked ConfigDict for a recipe."""
  return ml_collections.ConfigDict(_nested(cfg), convert_dict=True).lock()


def _nested(cfg: Any) -> dict[str, Any]:
  return {
      f.name: _nested(v) if dataclasses.is_dataclass(
          v := getattr(cfg, f.name)) else v
      for f in dataclasses.fields(cfg)
  }


def to_json(cfg: Config) -> str:
  return json.dumps(dataclasses.asdict(cfg), indent=2)


def from_mapping(values: Mapping[str, Any]) -> Config:
  """Build and check a Config from nested values (a recipe or JSON)."""
  return validate(_build(Config, values, ''))


def _build(cls: type, values: Any, prefix: str) -> Any:
  if not isinstance(values, Mapping):
    raise UserError(
        f'config.{prefix.removesuffix(".")}={values!r} must be a group of'
        ' settings by name, as in the config.json of a run.')
  hints = typing.get_type_hints(cls)
  kwargs = {}
  for name, value in values.items():
    if name not in hints:
      raise _unknown_key(prefix + name)
    if dataclasses.is_dataclass(hints[name]):
      kwargs[name] = _build(hints[name], value, f'{prefix}{name}.')
    else:
      kwargs[name] = _typed(prefix + name, value, hints[name])
  return cls(**kwargs)


def _unknown_key(key: str) -> UserError:
  keys = [k for k, _, _ in settings(Config())]
  near = difflib.get_close_matches(key, keys, 1, 0.0)[0]
  return UserError(
      f'config.{key} is no setting; the nearest is config.{near}. --help lists'
      ' all.'
  )


def _typed(key: str, value: Any, hint: Any) -> Any:
  """Convert integers to float and lists to tuple as the field's type asks."""
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if isinstance(value, (list, tuple)):
      return tuple(_typed(key, v, item) for v in value)
  elif hint is float and type(value) in (int, float):
    return float(value)
  elif hint is int and type(value) is float and value.is_integer():
    return int(value)
  elif type(value) is hint:
    return value
  name = hint.__name__ if isinstance(hint, type) else str(hint)
  raise UserError(f'config.{key}={value!r} must be of type {name}.')


def _parse(key: str, text: str, hint: Any) -> Any:
  """Read the text of a command-line override."""
  if hint is str:
    return text
  if hint is bool and text.lower() in ('true', 'false'):
    return text.lower() == 'true'
  if typing.get_origin(hint) is tuple and not text.startswith(('(', '[')):
    item = typing.get_args(hint)[0]
    parts = [p.strip() for p in text.split(',') if p.strip()]
    return tuple(_parse(key, p, item) for p in parts)
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def override(cfg: Config, overrides: Sequence[str]) -> Config:
  """Apply 'a.b=value' strings, typed by the fields they name."""
  values = dataclasses.asdict(cfg)
  for item in overrides:
    key, sign, text = item.partition('=')
    if not sign:
      raise UserError(f'{item!r} is no override; write config.key=value.')
    node, cls = values, Config
    *path, leaf = key.split('.')
    for name in path:
      hint = typing.get_type_hints(cls).get(name)
      if not dataclasses.is_dataclass(hint):
        raise _unknown_key(key)
      node, cls = node[name], hint
    hint = typing.get_type_hints(cls).get(leaf)
    if hint is None or dataclasses.is_dataclass(hint):
      raise _unknown_key(key)
    node[leaf] = _typed(key, _parse(key, text, hint), hint)
  return from_mapping(values)


# Settings that commands read which use a run that was trained.
USE = (
    'data.cache', 'data.cache_compiled', 'data.tokenizer.image',
    'model.mixer.backend', 'model.attention.backend', 'model.moma.backend',
)


def override_some(
    cfg: Config, overrides: Sequence[str], keys: Collection[str]
) -> Config:
  """Apply overrides to the settings of an existing run: only `keys`.

  Raises:
    UserError: another setting would.
  """
  changed = override(cfg, overrides)
  fixed = [line for line in differing(cfg, changed)
           if line.split(':')[0].removeprefix('config.') not in keys]
  if fixed:
    raise UserError(
        f'{"; ".join(fixed)}: fixed by the run in --workdir; leave it out or'
        ' train another run.'
    )
  return changed


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
  """Read a recipe and apply overrides.

  Args:
    path: a Python file with `get_config()` returning a ConfigDict, optionally
      followed by ':argument' which is passed on, or by ':name=value,...' for
      several; or a JSON file as a run leaves it in its workdir. Recipes
      alone are run as code.
    overrides: 'model.width=256' strings.
  Raises:
    UserError: the file is missing or no recipe, a key is unknown, a value
      fails its check, a JSON file names code that no override names.
  """
  text = os.path.expanduser(os.fspath(path))
  # A folder's name may hold the colon that separates a recipe's argument.
  file, _, argument = (
      (text, '', '') if os.path.isfile(text) else text.partition(':'))
  if not os.path.isfile(file):
    raise UserError(
        f'--config={text}: no such file; recipes are in configs/, e.g.'
        ' configs/quickstart.py.'
    )
  if not file.endswith('.json'):
    return override(
        from_mapping(_read_recipe(text, file, argument)), overrides)
  if argument:
    raise UserError(
        f'--config={text}: only recipes (.py) take an argument, {argument!r}.')
  cfg = override(from_mapping(read_json(file)), overrides)
  image = cfg.data.tokenizer.image
  names_code = ':' in image and not image.endswith('.npz')
  if names_code and image != given(overrides, 'data.tokenizer.image'):
    raise UserError(
        f'--config={text} names code, data.tokenizer.image={image!r}, which'
        ' nothing but a recipe may do; if you trust it, add'
        f' --config.data.tokenizer.image={image}.')
  return cfg


def given(overrides: Sequence[str], key: str) -> str:
  """Return the text that overrides give a setting, '' if they do not."""
  values = [text for name, _, text in (o.partition('=') for o in overrides)
            if name == key]
  return values[-1] if values else ''


def read_json(file: str | os.PathLike[str]) -> Mapping[str, Any]:
  """Read the settings in a JSON file.

  Raises:
    UserError: it cannot be read, or holds something else.
  """
  try:
    with open(file, encoding='utf-8') as f:
      values = json.load(f)
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'--config={file} is not valid JSON: {e}.') from e
  if not isinstance(values, dict):
    raise UserError(
        f'--config={file} holds a {type(values).__name__}, no settings; give'
        ' the config.json of a run.')
  return values


def _read_recipe(text: str, file: str, argument: str) -> Mapping[str, Any]:
  """Run a recipe, which is code; its own errors are the user's to correct."""
  try:
    recipe = _import_file(file)
    if not hasattr(recipe, 'get_config'):
      raise UserError(f'--config={text} defines no get_config().')
    values = _call(recipe.get_config, argument)
  except UserError:
    raise
  except Exception as e:  # whatever a recipe may raise
    lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__)
             if frame.filename == file]
    line = e.lineno if isinstance(e, SyntaxError) else (lines or [None])[-1]
    where = f', line {line}' if line else ''
    what = ' '.join(str(e).split()) or 'no message'
    raise UserError(
        f'--config={text}: {file}{where}: {type(e).__name__}: {what}') from e
  if not isinstance(values, ml_collections.ConfigDict):
    raise UserError(
        f'--config={text}: get_config() returns a {type(values).__name__}; it'
        ' must return config.to_config_dict(config.Config()), changed.')
  return values.to_dict()


def _call(recipe: Callable[..., Any], argument: str) -> Any:
  """Call recipe(), recipe('x'), or for 'a=x,b=3' recipe(a='x', b=3)."""
  if '=' not in argument:
    return recipe(*([argument] if argument else []))
  known = inspect.signature(recipe).parameters
  values = {}
  for item in argument.split(','):
    name, sign, text = item.partition('=')
    if name not in known or not sign:
      raise UserError(
          f'{item!r} is no argument of this recipe; write name=value, with'
          f' commas, of {", ".join(known)}.'
      )
    hint = type(known[name].default)
    values[name] = _parse(name, text, hint)
    if type(values[name]) is not hint:
      raise UserError(f'{item!r} must be of type {hint.__name__}.')
  return recipe(**values)


def _import_file(file: str) -> types.ModuleType:
  spec = importlib.util.spec_from_file_location('recipe', file)
  if spec is None:
    raise UserError(f'--config={file} must be a .py or .json file.')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def differing(a: Config, b: Config) -> list[str]:
  """List the settings in which two configs differ, 'key: a -> b'."""
  return [
      f'config.{key}: {x!r} -> {y!r}'
      for (key, x, _), (_, y, _) in zip(settings(a), settings(b))
      if x != y
  ]
