"""One block and one stack for ViT, CLIP's text tower, BERT, GPT-2, OPT, LLaMA: they differ in fields, not in code.

    pre-norm   x + f(norm(x))                   GPT-2, CLIP, LLaMA          post-norm   norm(x + f(x))      BERT
    parallel   x + f(norm(x)) + g(norm'(x))     GPT-NeoX

The sub-layers f are self-attention, optionally cross-attention, and an MLP.
Vaswani et al. 2017, §3.1; pre-norm: Xiong et al. 2020; RMSNorm: Zhang & Sennrich 2019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.attention import Attention, CrossAttention, KeysValues, QKNorm
from minivlm.layers.autocast import is_on, matrix_dtype
from minivlm.layers.mlp import MLP, Activation
from minivlm.layers.position import Cache, RopeScaling, Rotary, relative_bucket

Between = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What a stack of blocks is made of. The configs of towers and language models extend it."""

    width: int
    depth: int
    heads: int
    mlp_width: int | None = None  # None: four times the width
    kv_heads: int | None = None  # fewer than heads: grouped-query attention
    head_width: int | None = None  # None: width / heads
    causal: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_place: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-5
    norm_bias: bool = True  # of a LayerNorm
    activation: Activation = "gelu"
    gated_mlp: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    rope_theta: float | None = None  # rotary positions inside attention; None: none
    rope_scaling: RopeScaling | None = None
    rotary_fraction: float = 1.0  # of a head's channels, the first ones, have rotary positions (GPT-NeoX: not all)
    parallel_residual: bool = False  # attention and MLP have the same input (GPT-J, GPT-NeoX); pre-norm only
    qk_norm: QKNorm | None = None  # of queries and keys, see `Attention`
    attention_scale: float | None = None  # of the scores; None: 1/√head_width. T5: 1, its weights were trained so
    relative_buckets: int = 0  # distances between tokens told apart, for T5's learned bias on the scores; 0: no bias
    relative_distance: int = 128  # all that are further apart share the last bucket
    alibi: bool = False  # the further away a token is, the less it is attended to (see `Alibi`)
    cross_attention_every: int = 0  # blocks 0, n, 2n … attend to a context; 0: no block does
    context_width: int | None = None  # its width; None: the same as ours
    dropout: float = 0.0

    @property
    def hidden_width(self) -> int:
        """Of the MLPs. Derived when asked for, so that a config whose width is replaced takes its MLPs along."""
        return self.mlp_width or 4 * self.width

    @property
    def rotary_width(self) -> int:
        """How many channels of a head turn."""
        return int(self.rotary_fraction * (self.head_width or self.width // self.heads))


class RMSNorm(nn.RMSNorm):
    """In half precision it brings a residual stream that is wider than its weights, a T5's in fp16, back to theirs."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or is_on(x):
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


def make_norm(config: TransformerConfig) -> nn.Module:
    c = config
    if c.norm == "rmsnorm":
        return RMSNorm(c.width, eps=c.norm_eps)
    return nn.LayerNorm(c.width, eps=c.norm_eps, bias=c.norm_bias)


def take(x: Tensor, at: Tensor) -> Tensor:
    """x (B, T, D), positions at (B,) → (B, 1, D)"""
    return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[2]))


def bound(x: Tensor) -> Tensor:
    """In fp16, infinities become large numbers (as transformers' T5 has it): the next norm makes them finite, not NaN."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    return x.clamp(*(limit * torch.where(x.isinf().any(), largest - 1000, largest) for limit in (-1, 1)))


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """x (B, T, D) · scale (D,), in the precision of x."""
    return x if scale is None else x * scale.to(x.dtype)


class Block(nn.Module):
    """Self-attention, optionally cross-attention, MLP; each with its norm and its residual. x (B, T, D) → (B, T, D).

    layer_scale: what each branch's learned scale of its channels starts at (LayerScale: Touvron et al. 2021, CaiT, §2.1).
    """

    def __init__(self, config: TransformerConfig, *, cross_attention: bool = False, layer_scale: float | None = None):
        super().__init__()
        c = config
        self.pre_norm, self.parallel = c.norm_place == "pre", c.parallel_residual
        if self.parallel and (cross_attention or not self.pre_norm):
            raise ValueError("parallel_residual is for pre-norm blocks without cross-attention")
        if layer_scale is not None and (self.parallel or cross_attention):
            raise ValueError("layer_scale is for blocks of one residual each, without cross-attention")
        self.bounded = c.relative_buckets > 0  # a T5's activations pass what fp16 can hold
        self.attention_norm = make_norm(c)
        self.attention = Attention(
            c.width,
            c.heads,
            kv_heads=c.kv_heads,
            head_width=c.head_width,
            bias=c.qkv_bias,
            out_bias=c.out_bias,
            causal=c.causal,
            scale=c.attention_scale,
            dropout=c.dropout,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            norm_bias=c.norm_bias,
        )
        if cross_attention:
            self.cross_attention_norm = make_norm(c)
            self.cross_attention = CrossAttention(
                c.width,
                c.heads,
                head_width=c.head_width,
                context_width=c.context_width,
                bias=c.qkv_bias,
                out_bias=c.out_bias,
                scale=c.attention_scale,
                dropout=c.dropout,
            )
        else:
            self.cross_attention = None
        self.mlp_norm = make_norm(c)
        self.mlp = MLP(c.width, c.hidden_width, c.activation, gated=c.gated_mlp, bias=c.mlp_bias)
        self.dropout = nn.Dropout(c.dropout)
        new = lambda: None if layer_scale is None else nn.Parameter(torch.full((c.width,), layer_scale))
        self.attention_layer_scale, self.mlp_layer_scale = new(), new()

    def forward(
        self,
        x: Tensor,
        context: Tensor | KeysValues | None = None,
        *,
        context_mask: Tensor | None = None,
        **options,
    ) -> Tensor:
        """options: of `Attention`."""
        attend = lambda h: self.attention(h, **options)
        if self.parallel:
            attended = self.dropout(attend(self.attention_norm(x)))
            return self.residual(x, self.mlp_norm, self.mlp) + attended
        x = self.residual(x, self.attention_norm, attend, self.attention_layer_scale)
        if self.cross_attention is not None and context is not None:
            cross = lambda h: self.cross_attention(h, context, mask=context_mask)
            x = self.residual(x, self.cross_attention_norm, cross)
        return self.residual(x, self.mlp_norm, self.mlp, self.mlp_layer_scale)

    def residual(
        self, x: Tensor, norm: nn.Module, f: Callable[[Tensor], Tensor], scale: Tensor | None = None
    ) -> Tensor:
        """x + scale · f(norm(x)), or norm(x + scale · f(x))."""
        x = x + self.dropout(scaled(f(norm(x) if self.pre_norm else x), scale))
        x = bound(x) if self.bounded else x
        return x if self.pre_norm else norm(x)

    def state_at(self, x: Tensor, at: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """`forward` for one token a row: x (B, T, D), positions at (B,) → (B, 1, D). Pre-norm self-attention only."""
        h = self.attention_norm(x)
        x, query = take(x, at), take(h, at)
        x = x + self.dropout(scaled(self.attention(query, h, mask=mask), self.attention_layer_scale))
        return x + self.dropout(scaled(self.mlp(self.mlp_norm(x)), self.mlp_layer_scale))


class RelativePositions(nn.Module):
    """A learned number for each head and each distance, added to the scores (Raffel et al. 2020 (T5), §2.1).

    positions of the queries (T,) or (B, T), keys at 0, 1, … S − 1 → (1 or B, H, T, S). One table serves a whole stack.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.relative_buckets, config.heads)

    def forward(self, positions: Tensor, keys: int) -> Tensor:
        c = self.config
        distance = torch.arange(keys, device=positions.device) - positions[..., None]  # (…, T, S): key − query
        buckets = relative_bucket(distance, c.relative_buckets, c.relative_distance, both_sides=not c.causal)
        bias = self.table(buckets).movedim(-1, -3)  # (…, H, T, S)
        return bias if bias.dim() == 4 else bias[None]


class Alibi(nn.Module):
    """−slope · distance, added to the scores: each head forgets at a pace of its own (Press et al. 2022, §3). Causal only.

    positions of the queries (T,) or (B, T), keys at 0, 1, … S − 1 → (1 or B, H, T, S). The slopes are 2^(−8i/H), for i = 1 …
    H; where H is no power of two, every second one of those for the next power, then the rest.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads

    def forward(self, positions: Tensor, keys: int) -> Tensor:
        distance = torch.arange(keys, device=positions.device) - positions[..., None]  # (…, T, S): key − query
        bias = self.slopes(positions.device) * distance[..., None, :, :]
        return bias if bias.dim() == 4 else bias[None]

    def slopes(self, device: torch.device) -> Tensor:
        """(H, 1, 1)"""
        power = 1 << (self.heads - 1).bit_length()
        slopes = 2.0 ** (-8 / power * torch.arange(1, power + 1, device=device))
        if power != self.heads:
            slopes = torch.cat([slopes[1::2], slopes[::2]])[: self.heads]
        return slopes.view(-1, 1, 1)


class Transformer(nn.Module):
    """A stack of blocks, without embeddings and without a last norm: those belong to the towers that use it.

    x (B, T, D) → (B, T, D).  mask: (B, T) real tokens or (B, T, T) pairs, True = may be attended to.
    context (B, S, C), context_mask (B, S) or (B, T, S): what blocks with cross-attention attend to. A context that is used
    more than once is given as `context_keys_values` returns it.
    layer: how far to run, as an index into [input, after block 0, …, after block depth−1]: −1 all, −2 all but the last.
    positions (T,) or (B, T): where the tokens stand, for rotary angles; None: 0, 1, 2 …
    cache: a `Cache` that already holds what came before x; x is appended to it, and `mask` only counts its real tokens.
    between(i, x) → x, what block i gets in place of x: the layers of another model between these (Flamingo).
    """

    def __init__(self, config: TransformerConfig, *, layer_scale: float | None = None):
        super().__init__()
        self.config = config
        every, more = config.cross_attention_every, dict(layer_scale=layer_scale)
        self.blocks = nn.ModuleList(
            Block(config, cross_attention=bool(every) and i % every == 0, **more) for i in range(config.depth)
        )
        self.relative = RelativePositions(config) if config.relative_buckets else None
        if config.alibi:
            self.relative = Alibi(config)

    def forward(
        self,
        x: Tensor,
        context: Tensor | list[KeysValues | None] | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        layer: int = -1,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        between: Between | None = None,
    ) -> Tensor:
        T = x.shape[1]
        blocks = self.blocks[: self.blocks_to_run(layer)]
        if cache is not None:
            positions = cache.begin(T)
        elif positions is None:
            positions = torch.arange(T, device=x.device)
        rope = self.rotary(positions)
        bias = None if self.relative is None else self.relative(positions, cache.width if cache is not None else T)
        for index, block in enumerate(blocks):
            if between is not None:
                x = between(index, x)
            layer_cache = cache.layer(index) if cache is not None else None
            source = context[index] if isinstance(context, list) else context
            x = block(x, source, mask=mask, context_mask=context_mask, bias=bias, rope=rope, cache=layer_cache)
        if cache is not None:
            cache.advance(mask, T)
        return x

    def context_keys_values(self, context: Tensor) -> list[KeysValues | None]:
        """(B, S, C) → for every block the keys and values of its cross-attention, computed once for many uses."""
        cross = [block.cross_attention for block in self.blocks]
        return [None if attention is None else attention.keys_values(context) for attention in cross]

    def rotary(self, positions: Tensor) -> Rotary | None:
        c = self.config
        if c.rope_theta is None:
            return None
        return Rotary.at(positions, c.rotary_width, c.rope_theta, c.rope_scaling)

    def state_at(self, x: Tensor, at: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The last hidden state of one token a row: x (B, T, D), positions at (B,) → (B, D), as forward(x)[row, at[row]].

        The last block needs keys and values of all tokens, but query, output and MLP of this one token alone: that saves
        five sixths of the block's work (7 % of a 12-layer tower, 14 % of a 6-layer one).
        """
        c = self.config
        plain = c.norm_place == "pre" and not c.parallel_residual
        if not plain or c.rope_theta is not None or c.cross_attention_every or self.relative:
            return take(self(x, mask=mask), at)[:, 0]
        x = self(x, mask=mask, layer=-2)
        if c.causal:
            past = torch.arange(x.shape[1], device=x.device) <= at[:, None]  # (B, T)
            mask = past if mask is None else past & mask
        return self.blocks[-1].state_at(x, at, mask=mask)[:, 0]

    def blocks_to_run(self, layer: int) -> int:
        depth = len(self.blocks)
        count = layer if layer >= 0 else depth + 1 + layer
        if not 0 <= count <= depth:
            raise ValueError(
                f"layer {layer} does not exist: a stack of {depth} blocks has states 0 to {depth} (or −1 …)"
            )
        return count

    def new_cache(self, batch: int, capacity: int, *, static: bool = False) -> Cache:
        """An empty cache for `capacity` tokens a row, on the device of the weights and in the dtype of their products."""
        attention = self.blocks[0].attention
        weight = attention.k_proj.weight
        sizes = (len(self.blocks), batch, attention.kv_heads, capacity, attention.head_width)
        return Cache(*sizes, device=weight.device, dtype=matrix_dtype(weight), static=static)
