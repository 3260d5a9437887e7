"""Positions of tokens: rotary angles, position tables for another resolution, and the cache of keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Rotary angles for contexts longer than those of training.

    linear: all frequencies divided by `factor` (Chen et al. 2023). llama3: only the slow ones, those that turn less than
    `low_frequency` times within the original context; between that and `high_frequency` the two are mixed (Llama 3.1).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_context: int = 8192

    def __call__(self, frequency: Tensor) -> Tensor:
        if self.kind == "linear":
            return frequency / self.factor
        turns = self.original_context * frequency / (2 * math.pi)
        keep = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / self.factor


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: each pair of a head's channels turns by an angle proportional to its position.

    `Rotary.at(positions (B, T) or (T,), head_width, theta)` is a function on q or k (B, H, T, K) → the same shape.
    Channel i is paired with i + K/2, as LLaMA's published weights expect.  Su et al. 2021, §3.2.2. A q or k with wider heads
    has only its first channels turned.
    """

    cos: Tensor  # (B or 1, 1, T, K)
    sin: Tensor  # negative in the first half, which the second is subtracted from

    @classmethod
    def at(
        cls, positions: Tensor, head_width: int, theta: float = 10_000.0, scaling: RopeScaling | None = None
    ) -> Rotary:
        pair = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device)
        frequency = theta ** (-pair / head_width)  # (K/2,)
        if scaling is not None:
            frequency = scaling(frequency)
        angle = positions[..., None].float() * frequency  # (…, T, K/2)
        cos, sin = angle.cos(), angle.sin()
        shape = (-1, 1, positions.shape[-1], head_width)
        return cls(torch.cat([cos, cos], dim=-1).view(shape), torch.cat([-sin, sin], dim=-1).view(shape))

    def to(self, dtype: torch.dtype) -> Rotary:
        return Rotary(self.cos.to(dtype), self.sin.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        if (K := self.cos.shape[-1]) < x.shape[-1]:
            return torch.cat([self(x[..., :K]), x[..., K:]], dim=-1)
        swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (first, second) → (second, first)
        return torch.addcmul(x * self.cos.to(x.dtype), swapped, self.sin.to(x.dtype))


def relative_bucket(distance: Tensor, buckets: int, farthest: int, *, both_sides: bool) -> Tensor:
    """key − query, int64 of any shape → which of `buckets` it falls into (Raffel et al. 2020 (T5), §2.1).

    Half of them are for the nearest distances, one each; the rest grow wider logarithmically up to `farthest`. both_sides:
    keys after the query have half of all buckets; otherwise they share bucket 0 with the query itself.
    """
    start = torch.zeros_like(distance)
    if both_sides:
        buckets //= 2
        start = buckets * (distance > 0)
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    near = buckets // 2
    # In float32, as the published weights were trained: bucket borders depend on how the logarithm is rounded.
    steps = (distance.clamp(min=1).float() / near).log() / math.log(farthest / near) * (buckets - near)
    far = (near + steps.long()).clamp(max=buckets - 1)
    return start + torch.where(distance < near, distance, far)


def add_positions(features: Tensor, table: Tensor | None) -> Tensor:
    """Features (…, N, C) + position embeddings (N, C), where there is such a table. ValueError for another N."""
    if table is None:
        return features
    if features.shape[-2] != len(table):
        raise ValueError(f"an image has {features.shape[-2]} features, but there are positions for {len(table)}")
    return features + table.to(features.dtype)


def resize_position_table(table: Tensor, grid: tuple[int, int], *, leading: int = 0, antialias: bool = False) -> Tensor:
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
    how = dict(mode="bicubic", align_corners=False, antialias=antialias)
    patches = F.interpolate(patches.float(), size=(h, w), **how).to(table.dtype)
    return torch.cat([table[:leading], patches.flatten(2)[0].T])


class Cache:
    """Keys and values of every layer, allocated once; rows may have different lengths (padding on the right).

    lengths (B,): tokens a row holds so far. New tokens are written behind them; they attend to what came before.
    A step is `cache.begin(T)`, one `append` per layer, `cache.advance(mask, T)`; `Transformer` does that.

    The host knows without asking the device `filled`, the columns in use, `width`, those that a step attends to, and whether
    all rows are equally long (`even`): then plain causal attention over `filled` columns needs no mask. static: every step
    attends to all columns through a mask instead, so that its shapes never change and a compiled step stays compiled;
    `filled` stands still then.
    """

    def __init__(self, layers, batch, kv_heads, capacity, head_width, *, device=None, dtype=None, static=False):
        shape = (layers, batch, kv_heads, capacity, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.filled, self.even, self.static = 0, True, static

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def next_positions(self, T: int) -> Tensor:
        """Where the next T tokens stand: (T,) if that is the same in all rows, else (B, T)."""
        if self.even and not self.static:
            return torch.arange(self.filled, self.filled + T, device=self.lengths.device)
        return self.lengths[:, None] + torch.arange(T, device=self.lengths.device)

    def begin(self, T: int) -> Tensor:
        """Positions of the next T tokens; every layer's `append` of this step uses them."""
        end = self.filled + T
        if not self.static and end > self.capacity:
            raise ValueError(f"{self.filled} tokens and {T} more do not fit a cache made for {self.capacity}")
        self.positions = self.next_positions(T)
        self.width = width = self.columns_to_attend(T, end)
        self.visible = None
        if self.positions.dim() == 2:
            self.visible = torch.arange(width, device=self.lengths.device) <= self.positions[:, None, :, None]
        elif width > end:
            self.visible = torch.arange(width, device=self.lengths.device)[None] < end  # of one token: (1, S)
        self.layers = list(zip(self.columns(0, width), self.columns(self.filled, end), strict=True))
        return self.positions

    def columns_to_attend(self, T: int, end: int) -> int:
        """How many columns a step attends to: no more than `end`, but where more are cheaper.

        For the product with one query, PyTorch copies keys and values on a CPU unless it gets all columns, and in bf16 it
        compiles a kernel (1 ms) for every new shape, so that the width had better be the same for many steps.
        """
        if self.static:
            return self.capacity
        if T > 1 or self.keys.device.type != "cpu":
            return end
        return self.capacity if self.capacity < 2 * end else min(self.capacity, (end + 63) // 64 * 64)

    def columns(self, start: int, end: int) -> list[tuple[Tensor, Tensor]]:
        """Of every layer: keys and values (B, G, end − start, K), as views."""
        return list(zip(self.keys[..., start:end, :].unbind(0), self.values[..., start:end, :].unbind(0), strict=True))

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, *self.layers[index])

    def advance(self, mask: Tensor | None, T: int) -> None:
        """Count the new tokens: all T, or as many as each row of `mask` (B, T) says are real."""
        self.lengths = self.lengths + (T if mask is None else mask.sum(dim=1))
        if not self.static:
            self.filled += T
        self.even = self.even and mask is None

    def reorder(self, rows: Tensor) -> None:
        """Row i continues row rows[i]; rows (B',) may be more or fewer than there were."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)
        self.lengths = self.lengths[rows]


class LayerCache(NamedTuple):
    """One layer's part of a `Cache` in one step, as `Attention` uses it. Each pair: keys and values (B, G, ·, K)."""

    cache: Cache
    attended: tuple[Tensor, Tensor]  # the columns that are attended to
    new: tuple[Tensor, Tensor]  # those where the new tokens go if all rows are equally long

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """New k, v (B, G, T, K) are written in place → all keys, all values (B, G, S, K), and their mask.

        None: causal order alone decides. A padded key lies behind its row's length, which no real token attends to, until
        the next real token overwrites it. No gradient flows through a cache.
        """
        positions = self.cache.positions
        with torch.no_grad():
            if positions.dim() == 1:
                self.new[0].copy_(k)
                self.new[1].copy_(v)
            else:
                index = positions[:, None, :, None].expand_as(k)
                self.attended[0].scatter_(2, index, k.to(self.attended[0].dtype))
                self.attended[1].scatter_(2, index, v.to(self.attended[1].dtype))
        return *self.attended, self.cache.visible
