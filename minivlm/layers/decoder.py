"""The language model's step for one new token a row, laid out for speed: same numbers, fewer and larger operations.

    token (B,) ─ embed ─→ x ┬─→ [q|k|v] ─→ attend to the cache ─→ out ─┬ + ─┬─→ [gate|up] ─→ down ─┬ + ─→ … ─→ logits (B, V)
                            └──────────────────────────────────────────┘    └──────────────────────┘

A step multiplies every weight by a single row or a few, so it costs what reading the weights costs, and what calling the
operations costs. Here q, k, v are one matrix and gate, up another, each stored (inputs, outputs): one row times such a
matrix takes two thirds of the time that F.linear takes with (outputs, inputs) (fp32, on a CPU).

The twin to read is `LanguageModel.states` with a cache; a test holds the two equal. This one is a copy of the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from minivlm.layers.attention import attend
from minivlm.layers.position import Cache, LayerCache, Rotary
from minivlm.layers.transformer import Block

if TYPE_CHECKING:
    from minivlm.layers.language_model import LanguageModel

LARGEST = 2**31  # bytes of weights; beyond, a second copy costs more than it is worth


class PackedDecoder:
    """tokens (B,), the cache of what came before → logits (B, V); the tokens are appended to the cache.

    dtype: that of the matrices and of the cache.
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.blocks = [PackedBlock(block, dtype) for block in model.transformer.blocks]
        self.project_out = None if model.project_out is None else Matrix.of(model.project_out, dtype=dtype)
        self.head = Matrix.of(model.head, dtype=dtype)
        self.made_of = fingerprint(model)

    def is_current(self) -> bool:
        """Has no parameter changed or been replaced since?"""
        before, now = self.made_of, fingerprint(self.model)
        return len(before) == len(now) and all(a is b and x == y for (a, *x), (b, *y) in zip(before, now, strict=True))

    def __call__(self, tokens: Tensor, cache: Cache) -> Tensor:
        model = self.model
        x = model.embed(tokens)  # (B, D)
        positions = cache.begin(1)  # (1,), or (B, 1)
        if model.position_embedding is not None:
            x = x + model.position_embedding(positions[..., 0] + model.config.position_offset)
        rope = model.transformer.rotary(positions)
        rope = None if rope is None else rope.to(self.dtype)
        hide = None if x.device.type != "cpu" else hidden(cache, self.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, rope, cache.layer(index), hide)
        cache.advance(None, 1)
        x = x if model.norm is None else model.norm(x)
        return self.head(x if self.project_out is None else self.project_out(x))


class PackedBlock:
    """x (B, D) → (B, D): `Block` for one token a row."""

    def __init__(self, block: Block, dtype: torch.dtype):
        attention, mlp = block.attention, block.mlp
        self.block = block  # its norms and its sizes
        self.qkv = Matrix.of(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype)
        self.out = Matrix.of(attention.out_proj, dtype=dtype)
        ups = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
        self.up = Matrix.of(*ups, dtype=dtype)
        self.down = Matrix.of(mlp.down_proj, dtype=dtype)

    def __call__(self, x: Tensor, rope: Rotary | None, cache: LayerCache, hide: Tensor | None) -> Tensor:
        b = self.block
        if b.pre_norm:
            x = x + self.attention(b.attention_norm(x), rope, cache, hide)
            return x + self.mlp(b.mlp_norm(x))
        x = b.attention_norm(x + self.attention(x, rope, cache, hide))
        return b.mlp_norm(x + self.mlp(x))

    def attention(self, x: Tensor, rope: Rotary | None, cache: LayerCache, hide: Tensor | None) -> Tensor:
        a = self.block.attention
        H, G = a.heads, a.kv_heads
        qkv = self.qkv(x).view(len(x), H + 2 * G, 1, a.head_width)
        qk = qkv[:, : H + G] if rope is None else rope(qkv[:, : H + G])
        k, v, visible = cache.append(qk[:, H:], qkv[:, H + G :])  # (B, G, S, K): all so far
        if hide is None:
            return self.out(attend(qk[:, :H], k, v, mask=visible, scale=a.scale, backend=a.backend).flatten(1))
        return self.out(attend_to_past(qk[:, :H], k, v, hide, a.scale))

    def mlp(self, x: Tensor) -> Tensor:
        mlp = self.block.mlp
        if mlp.gate_proj is None:
            return self.down(mlp.activation(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=1)
        return self.down(mlp.activation(gate).mul_(up))


def attend_to_past(q: Tensor, k: Tensor, v: Tensor, hide: Tensor, scale: float | None = None) -> Tensor:
    """`attend` for one query a row: q (B, H, 1, K), k and v (B, G, S, K), hide: see `hidden` → (B, H·K).

    On a CPU as fast as PyTorch's fused kernel (batch 1), 1.2 times as fast (batch 8), or 3 times (bf16).
    """
    (B, H, _, K), G = q.shape, k.shape[1]
    q, k, v = q.reshape(B * G, H // G, K), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(hide, q, k.transpose(1, 2), alpha=K**-0.5 if scale is None else scale)  # (B·G, H/G, S)
    return torch.bmm(scores.softmax(dim=-1), v).view(B, H * K)


def hidden(cache: Cache, dtype: torch.dtype) -> Tensor:
    """Added to the scores of this step: 0 where a row may look, −∞ elsewhere, (1, 1, S) or (B·G, 1, S)."""
    _, B, G, _, _ = cache.keys.shape
    if cache.visible is None:
        return torch.zeros(1, 1, 1, dtype=dtype)
    hide = torch.zeros(cache.visible.shape, dtype=dtype).masked_fill_(~cache.visible, -torch.inf)
    return hide[None] if hide.dim() == 2 else hide.expand(B, G, 1, -1).flatten(0, 1)


class Matrix(NamedTuple):
    """x (B, I) → (B, O), as one nn.Linear or several side by side."""

    weight: Tensor  # (I, O)
    bias: Tensor | None  # (O,)

    @classmethod
    def of(cls, *linears: nn.Module, dtype: torch.dtype) -> Matrix:
        weight = torch.cat([linear.weight.detach() for linear in linears]).to(dtype)
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears]).to(dtype)
        return cls(weight.T.contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


def fingerprint(model: nn.Module) -> list[tuple]:
    """Each parameter with the number of its changes and where its memory lies."""
    return [(p, p._version, p.data_ptr()) for p in model.parameters()]


def can_be_packed(model: LanguageModel) -> bool:
    """Not while it trains, not with other blocks than self-attention and MLP, and not if it is too large to be copied."""
    stack = model.transformer
    plain = stack.relative is None and all(type(b) is Block and b.cross_attention is None for b in stack.blocks)
    return plain and not model.training and sum(p.nbytes for p in model.parameters()) <= LARGEST
