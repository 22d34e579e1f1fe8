"""Shared by layers: parameters, Einsum, norms, initialisers, router state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mom_jax.parallel import per_device, sharding
from mom_jax.routing import dispatch

Axes = tuple[str | None, ...]
Draw = Callable[..., jax.Array]  # (key, shape) -> values

class LayerInfo(NamedTuple):
  """Inputs of a layer that depend on its index.

  Attributes:
    constants: 'layer_fraction', index of the layer / number of layers, and the
      layer's part of the rule's cross-layer values (`rules.layer_values`).
    v_first_BTHV: values of the first layer, for rules that ask for them.
  """

  constants: dict[str, jax.Array]
  v_first_BTHV: jax.Array | None = None


class TokenInfo(NamedTuple):
  """Facts about each token, beside its vector.

  Attributes:
    modality_BT: index of its modality, -1 on padding.
    segment_BT: document of the token, 0 on padding.
    position_BT: in its document, counting tokens that the layer does not get.
  """

  modality_BT: Int[Array, 'B T']
  segment_BT: Int[Array, 'B T']
  position_BT: Int[Array, 'B T']


# Embeddings and dense channel mixers.
normal_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Xavier:
  """Uniform values with bound gain * sqrt(6 / (inputs + outputs)), per matrix.

  `along(axes)` reads logical axes: 'memory' is a stack of matrices, 'embed' one
  side of a matrix, or without it the first axis, and the rest the other side.
  """

  gain: float

  def along(self, axes: Axes) -> Draw:
    """Return the initialiser of a parameter with these logical axes."""
    names = [a for a in axes if a != 'memory']
    at = names.index('embed') if 'embed' in names else 0

    def init(key, shape):
      sizes = [n for a, n in zip(axes, shape) if a != 'memory']
      fans = sizes[at] + math.prod(sizes) // sizes[at]
      bound = self.gain * math.sqrt(6 / fans)
      return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return init


Init = Draw | Xavier

# Every projection inside a MoM layer, as the official code does.
mom_init = Xavier(2**-2.5)


def conv_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draw a depthwise convolution [taps, ...], uniform with bound taps^-1/2."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def copied(init: Draw, axes: Axes) -> Draw:
  """Make `init` draw each modality's copy as it would draw the only one."""
  if 'modality' not in axes:
    return init
  at = axes.index('modality')

  def draw(key, shape):
    one = shape[:at] + shape[at + 1:]
    keys = jax.random.split(key, shape[at])
    return jnp.stack([init(key, one) for key in keys], at)

  return draw


_boxed = contextvars.ContextVar('boxed', default=False)


@contextlib.contextmanager
def with_logical_axes() -> Iterator[None]:
  """Make `init` box each parameter with its logical axes, for sharding.

  Outside of it a layer's `init` returns plain arrays.
  """
  token = _boxed.set(True)
  try:
    yield
  finally:
    _boxed.reset(token)


def param(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: Axes, init: Init
) -> jax.Array:
  """Make a float32 parameter of `module` with logical axes."""
  if isinstance(init, Xavier):
    init = init.along(tuple(a for a in axes if a != 'modality'))
  draw = copied(init, axes)
  if _boxed.get():
    draw = nn.with_logical_partitioning(draw, axes)
  return jnp.asarray(module.param(name, draw, shape))  # no NumPy arrays


def router_state(
    module: nn.Module,
    collection: str,
    name: str,
    num_experts: int,
    init: Callable[[int], jax.Array],
) -> jax.Array:
  """Make the state [E] of a router, such as balance biases: no gradient.

  Args:
    collection: of Flax variables that holds it. 'router' keeps it apart from
      what is trained; a language model keeps it among its 'params'.
    init: number of experts -> initial state.
  """
  if collection == 'params':
    initial = lambda key, shape: init(shape[0])
    state_E = param(module, name, (num_experts,), (None,), initial)
  else:
    state_E = module.variable(collection, name, init, num_experts).value
  return jax.lax.stop_gradient(state_E)


def unless_initializing(
    module: nn.Module, fn: Callable[..., Any]
) -> Callable[..., Any]:
  """Return `fn`, or while `module` initialises zeros of its result's shapes.

  Parameters do not depend on what is computed with them, so `init` is as fast
  outside `jit` as inside.
  """
  if not module.is_initializing():
    return fn

  @functools.wraps(fn)
  def zeros(*args: Any) -> Any:
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *args))

  return zeros


class Einsum(nn.Module):
  """y = einsum(eq, x, kernel), in x's type or `dtype`, without a bias.

  Attributes:
    eq: e.g. 'btd,dhk->bthk'.
    shape: of the kernel.
    axes: the kernel's logical axes.
    init: of the kernel.
    dtype: type of the product; None is x's. With float32 the product uses full
      precision on every device (no bfloat16 passes, no TF32), because routers
      decide by it.
    out_dtype: type of the result, and of the sums; None is `dtype`'s.
    modalities: number of kernels, of which a token takes its modality's; 0 is
      one kernel for all. The equation is then one of tokens, 'bt...', and the
      kernel begins with the token's other letters.
  """

  eq: str
  shape: tuple[int, ...]
  axes: Axes
  init: Init = normal_init
  dtype: Any = None
  out_dtype: Any = None
  modalities: int = 0

  @nn.compact
  def __call__(
      self, x: Float[Array, ' *X'], modality_BT: jax.Array | None = None
  ) -> Float[Array, ' *Y']:
    """Multiply; with `modalities`, to 0 where `modality_BT` is -1."""
    if self.modalities:
      if modality_BT is None:
        raise ValueError(
            f'{self.modalities} copies of {self.name!r}, one per modality, need'
            ' the modality of each token.'
        )
      kernel = param(
          self, 'kernel', (self.modalities, *self.shape),
          ('modality', *self.axes), self.init)
      spec = PartitionSpec(None, *(
          axis if axis == sharding.FSDP_SHARDED else None
          for axis in self.axes))
      run = per_device.batch_local(_times_own, shared=spec)
      return unless_initializing(self, run)(
          (x, modality_BT), kernel.astype(x.dtype))
    kernel = param(self, 'kernel', self.shape, self.axes, self.init)
    return unless_initializing(self, self._product)(x, kernel)

  def _product(self, x, kernel):
    dtype = self.dtype or x.dtype
    exact = self.dtype is not None and jnp.dtype(self.dtype) == jnp.float32
    return jnp.einsum(
        self.eq, x.astype(dtype), kernel.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=self.out_dtype or dtype,
    )


def _times_own(batched, kernel):
  """Multiply x [B, T, *in] by its modality's kernel of [S, *in, *out]."""
  x, modality_BT = batched
  size = x.shape[2:]
  y_RF = dispatch.matmul(
      x.reshape(-1, math.prod(size)),
      kernel.reshape(len(kernel), math.prod(size), -1),
      modality_BT.reshape(-1))
  return y_RF.reshape(*x.shape[:2], *kernel.shape[1 + len(size):])


def _channels(module, name, shape, axes, init, x, modality_BT):
  """Make parameters for the last axes of x.

  Each token gets its modality's if there are copies.
  """
  if not module.modalities:
    own = param(module, name, shape, axes, init)
    return own.reshape((1,) * (x.ndim - len(shape)) + shape)
  own = param(
      module, name, (module.modalities, *shape), ('modality', *axes), init)
  # A sum with one term for each token, exact in float32.
  of_BTS = jax.nn.one_hot(modality_BT, len(own))
  own = jnp.tensordot(of_BTS, own, 1, precision=jax.lax.Precision.HIGHEST)
  middle = (1,) * (x.ndim - 2 - len(shape))
  return own.reshape(*modality_BT.shape, *middle, *shape)


class RMSNorm(nn.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32.

  Attributes:
    eps: added to the mean square.
    modalities: number of scales, of which a token takes its modality's; 0 is
      one scale for all.
  """

  eps: float
  modalities: int = 0

  @nn.compact
  def __call__(
      self, x: Float[Array, '*R D'], modality_BT: jax.Array | None = None
  ) -> Float[Array, '*R D']:
    """Normalise; with `modalities`, to 0 where `modality_BT` is -1."""
    scale = _channels(self, 'scale', x.shape[-1:], (None,),
                      nn.initializers.ones_init(), x, modality_BT)

    def normalised(x, scale):
      y = x.astype(jnp.float32)
      y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
      return (y * scale).astype(x.dtype)

    return unless_initializing(self, normalised)(x, scale)


class LayerNorm(nn.Module):
  """y = (x - mean) / sqrt(variance + eps) * scale + bias, in float32.

  Source: arXiv 1607.06450.

  Attributes:
    eps: added to the variance.
    modalities: as of `RMSNorm`, for scales and biases.
  """

  eps: float
  modalities: int = 0

  @nn.compact
  def __call__(
      self, x: Float[Array, '*R D'], modality_BT: jax.Array | None = None
  ) -> Float[Array, '*R D']:
    """Normalise; with `modalities`, to 0 where `modality_BT` is -1."""
    own = lambda name, init: _channels(
        self, name, x.shape[-1:], (None,), init, x, modality_BT)
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    y = y * own('scale', nn.initializers.ones_init())
    return (y + own('bias', nn.initializers.zeros_init())).astype(x.dtype)


# Norms of the residual stream, by `model.norm`: made from (eps,
# modalities, name=...).
NORMS = {'rms': RMSNorm, 'layer': LayerNorm}


class OutputNorm(nn.Module):
  """Norm of the output of memories, [*R, H, V], in float32.

  Attributes:
    kind: 'head', RMS over each head's channels, one scale [V] for all heads;
      'all', RMS over heads and channels, scale [H, V]; 'group', mean and
      deviation of each head, scale and bias [H, V]; 'none'.
    eps: added to mean squares.
    modalities: as of `RMSNorm`, for scales and biases.
  """

  kind: str
  eps: float
  modalities: int = 0

  @nn.compact
  def __call__(
      self, o: Float[Array, '*R H V'], modality_BT: jax.Array | None = None
  ) -> Float[Array, '*R H V']:
    """Normalise as `kind` says."""
    if self.kind == 'none':
      return o
    shape = o.shape[-1:] if self.kind == 'head' else o.shape[-2:]
    axes = (None,) if self.kind == 'head' else ('heads', 'kv')
    own = lambda name, init: _channels(
        self, name, shape, axes, init, o, modality_BT)
    scale = own('scale', nn.initializers.ones_init())
    y = o.astype(jnp.float32)
    if self.kind == 'group':
      y = y - y.mean(-1, keepdims=True)
    over = (-2, -1) if self.kind == 'all' else (-1,)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(over, keepdims=True) + self.eps)
    y = y * scale
    if self.kind == 'group':
      y = y + own('bias', nn.initializers.zeros_init())
    return y.astype(o.dtype)


def position_in_document(segment: Int[Array, 'B T']) -> Int[Array, 'B T']:
  """Count the tokens of the same document before each token.

  Padding may stand between tokens of a document, and does not count; its own
  position means nothing.
  """
  valid_BT = segment > 0
  count_BT = jnp.cumsum(valid_BT, 1)
  index_BT = jnp.where(valid_BT, jnp.arange(segment.shape[1])[None], -1)
  newest_BT = jax.lax.cummax(index_BT, axis=1)
  before_BT = jnp.pad(newest_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  before_segment_BT = jnp.take_along_axis(
      segment, jnp.maximum(before_BT, 0), axis=1)
  same_BT = (before_BT >= 0) & (before_segment_BT == segment)
  first_BT = jnp.where(valid_BT & ~same_BT, count_BT, 0)
  return count_BT - jax.lax.cummax(first_BT, axis=1)
