"""Small parts that every layer uses: Einsum, RMSNorm, initialisers."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Axes = tuple[str | None, ...]
Init = Callable[..., jax.Array]

# Embeddings and dense channel mixers.
normal_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Xavier:
  """Uniform with bound gain * sqrt(6 / (inputs + outputs)).

  Called as an initialiser it reads a shape as [inputs, *outputs], or with four
  axes as that many matrices on the first. `along(axes)` reads logical axes
  instead: 'embed' is one side, the rest the other, 'memory' a stack.
  """

  gain: float

  def __call__(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    inputs, *outputs = shape[-3:] if len(shape) == 4 else shape
    return self._draw(key, shape, inputs + math.prod(outputs))

  def along(self, axes: Axes) -> Init:
    def init(key, shape):
      sizes = [(a, n) for a, n in zip(axes, shape) if a != 'memory']
      width = math.prod(n for a, n in sizes if a == 'embed')
      other = math.prod(n for a, n in sizes if a != 'embed')
      return self._draw(key, shape, width + other)

    return init

  def _draw(self, key, shape, fans):
    bound = self.gain * math.sqrt(6 / fans)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


# Every projection inside a MoM layer, as the official code does.
mom_init = Xavier(2**-2.5)


def conv_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Of a depthwise convolution [taps, ...]: uniform, bound taps^-1/2."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def param(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: Axes, init: Init
) -> jax.Array:
  """Makes a float32 parameter of `module` with logical axes."""
  if isinstance(init, Xavier):
    init = init.along(axes)
  return module.param(name, nn.with_logical_partitioning(init, axes), shape)


class Einsum(nn.Module):
  """y = einsum(eq, x, kernel), in x's type or `dtype`, without a bias.

  Attributes:
    eq: e.g. 'btd,dhk->bthk'.
    shape: of the kernel.
    axes: the kernel's logical axes.
    init: (key, shape) -> kernel.
    dtype: type of the product; None is x's. float32 asked for here is float32
      on every device, without the short cuts of TPU and GPU: routers decide
      by it.
    out_dtype: type of the result, and of the sums; None is `dtype`'s.
  """

  eq: str
  shape: tuple[int, ...]
  axes: Axes
  init: Init = normal_init
  dtype: Any = None
  out_dtype: Any = None

  @nn.compact
  def __call__(self, x: Float[Array, ' *X']) -> Float[Array, ' *Y']:
    dtype = self.dtype or x.dtype
    kernel = param(self, 'kernel', self.shape, self.axes, self.init)
    exact = self.dtype is not None and jnp.dtype(self.dtype) == jnp.float32
    return jnp.einsum(
        self.eq, x.astype(dtype), kernel.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=self.out_dtype or dtype,
    )


class RMSNorm(nn.Module):
  """y = x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, '*R D']) -> Float[Array, '*R D']:
    scale_D = param(
        self, 'scale', x.shape[-1:], (None,), nn.initializers.ones_init())
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * scale_D.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class LayerNorm(nn.Module):
  """y = (x - mean) / sqrt(variance + eps) * scale + bias, in float32.

  Source: arXiv 1607.06450.
  """

  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, '*R D']) -> Float[Array, '*R D']:
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    scale_D = param(self, 'scale', x.shape[-1:], (None,), ones)
    bias_D = param(self, 'bias', x.shape[-1:], (None,), zeros)
    wide = lambda v_D: v_D.reshape((1,) * (x.ndim - 1) + (-1,))
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    return (y * wide(scale_D) + wide(bias_D)).astype(x.dtype)


# Norms of the residual stream, by `model.norm`: made from (eps, name=...).
NORMS = {'rms': RMSNorm, 'layer': LayerNorm}


class ReadNorm(nn.Module):
  """Normalises what memories read, [*R, H, V], in float32.

  Attributes:
    kind: 'head', RMS over each head's channels, one scale [V] for all heads;
      'all', RMS over heads and channels, scale [H, V]; 'group', mean and
      deviation of each head, scale and bias [H, V]; 'none'.
    eps: added to mean squares.
  """

  kind: str
  eps: float

  @nn.compact
  def __call__(self, o: Float[Array, '*R H V']) -> Float[Array, '*R H V']:
    if self.kind == 'none':
      return o
    shape = o.shape[-1:] if self.kind == 'head' else o.shape[-2:]
    axes = (None,) if self.kind == 'head' else ('heads', 'kv')
    scale = param(self, 'scale', shape, axes, nn.initializers.ones_init())
    y = o.astype(jnp.float32)
    if self.kind == 'group':
      y = y - y.mean(-1, keepdims=True)
    over = (-2, -1) if self.kind == 'all' else (-1,)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(over, keepdims=True) + self.eps)
    y = y * scale.reshape((1,) * (o.ndim - len(shape)) + shape)
    if self.kind == 'group':
      bias = param(self, 'bias', shape, axes, nn.initializers.zeros_init())
      y = y + bias.reshape((1,) * (o.ndim - 2) + shape)
    return y.astype(o.dtype)
