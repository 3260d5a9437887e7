"""Where a token stands: rotary angles, position tables for another resolution, and the cache that remembers keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: each pair of a head's channels turns by an angle proportional to its position.

    `Rotary.at(positions (B, T) or (T,), head_width, theta)` is a function on q or k (B, H, T, K) → the same shape.
    Channel i is paired with i + K/2, as LLaMA's published weights expect.  Su et al. 2021, §3.2.2.
    """

    cos: Tensor  # (B or 1, 1, T, K)
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, head_width: int, theta: float = 10_000.0) -> Rotary:
        pair = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device)
        frequency = theta ** (-pair / head_width)  # (K/2,)
        angle = positions[..., None].float() * frequency  # (…, T, K/2)
        angle = torch.cat([angle, angle], dim=-1).view(-1, 1, positions.shape[-1], head_width)
        return cls(angle.cos(), angle.sin())

    def __call__(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * self.cos.to(x.dtype) + turned * self.sin.to(x.dtype)


def resize_position_table(table: Tensor, grid: tuple[int, int], *, leading: int = 0) -> Tensor:
    """Position embeddings (leading + n·n, D) of a square grid, interpolated to another grid (h, w) of patches.

    The first `leading` rows (the class token's) stay as they are. Bicubic, as in Dosovitskiy et al. 2021, §3.2.
    """
    h, w = grid
    rows = table.shape[0] - leading
    side = round(rows**0.5)
    if side * side != rows:
        raise ValueError(f"{rows} patch positions are not a square grid; their interpolation is not defined")
    if (h, w) == (side, side):
        return table
    patches = table[leading:].T.reshape(1, -1, side, side)  # (1, D, n, n)
    patches = F.interpolate(patches.float(), size=(h, w), mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([table[:leading], patches.flatten(2)[0].T])


class Cache:
    """Keys and values of every layer, allocated once; rows may have different lengths (padding on the right).

    lengths (B,): tokens a row holds so far. New tokens are written behind them and see themselves and what came before.
    A step is `cache.begin(T)`, one `append` per layer, `cache.advance(mask)`; `Transformer` does that.
    """

    def __init__(self, layers, batch, kv_heads, capacity, head_width, *, device=None, dtype=None):
        shape = (layers, batch, kv_heads, capacity, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def begin(self, T: int) -> Tensor:
        """Positions (B, T) of the next T tokens; every layer's `append` of this step uses them."""
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        keys = torch.arange(self.capacity, device=self.lengths.device)
        self.visible = keys <= self.positions[:, None, :, None]  # (B, 1, T, capacity)
        return self.positions

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, index)

    def advance(self, mask: Tensor | None, T: int) -> None:
        """Count the new tokens: all T, or as many as each row of `mask` (B, T) says are real."""
        self.lengths = self.lengths + (T if mask is None else mask.sum(dim=1))


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a `Cache`, as `Attention` uses it."""

    cache: Cache
    index: int

    def append(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """New k, v (B, G, T, K) are written in place → all keys, all values (B, G, capacity, K), who may see them.

        The padding `mask` of the new tokens is not needed: a padded key lies behind its row's length, where no real
        token looks, until the next real token overwrites it.
        """
        index = self.cache.positions[:, None, :, None].expand_as(k)
        keys, values = self.cache.keys[self.index], self.cache.values[self.index]
        keys.scatter_(2, index, k.to(keys.dtype))
        values.scatter_(2, index, v.to(values.dtype))
        return keys, values, self.cache.visible
