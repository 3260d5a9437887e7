"""A decoder's step for one new token a row, laid out for speed: same numbers, fewer and larger operations.

    token (B,) ─ embed ─→ x ┬─→ [q|k|v] ─→ attend to the cache ─→ out ─┬ + ─┬─→ [gate|up] ─→ down ─┬ + ─→ … ─→ logits (B, V)
                            └──────────────────────────────────────────┘    └──────────────────────┘

A step multiplies every weight by a single row or a few, so it costs what reading the weights costs, and what calling the
operations costs. Here q, k, v are one matrix and gate, up another, each stored (inputs, outputs): one row times such a
matrix takes two thirds of the time that F.linear takes with (outputs, inputs) (fp32, on a CPU).

Its plain twins are `LanguageModel.states` and `T5.states` with a cache; a test holds them equal. This one is a copy of the
weights.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from minivlm.layers.attention import Attention, KeysValues, attend
from minivlm.layers.masks import expand_mask
from minivlm.layers.position import Cache, LayerCache, Rotary
from minivlm.layers.transformer import Between, Block, Transformer, bound

LARGEST = 2**31  # bytes of weights; beyond, a second copy costs more than it is worth


class PackedWeights(nn.Module):
    """A part of a model that holds a second copy of its weights, kept until they change. It is neither saved nor copied."""

    def __init__(self, packed_class: type[Packed]):
        super().__init__()
        self.packed_class = packed_class
        self.current: Packed | None = None

    def of(self, model: nn.Module, dtype: torch.dtype) -> Packed | None:
        """The model's weights as `packed_class` lays them out; None where that cannot be."""
        if not can_be_packed(model, self.packed_class):
            return None
        packed = self.current
        if packed is None or packed.dtype != dtype or not packed.is_current():
            packed = self.packed_class(model, dtype)
        training = any(p.grad is not None for p in model.parameters())  # fused optimisers change weights unnoticed
        self.current = None if training else packed
        return packed

    def clear(self) -> None:
        self.current = None

    def _apply(self, fn, recurse: bool = True) -> PackedWeights:
        self.clear()  # the model goes to another device or dtype
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "current": None}


class Packed:
    """The stack and the head behind it, laid out in dtype, which is the cache's as well."""

    reads: ClassVar[bool]  # is there a context for blocks with cross-attention?

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model, self.dtype, self.stack = model, dtype, self.stack_of(model)
        self.blocks = [PackedBlock(block, dtype) for block in self.stack.blocks]
        self.head = Matrix.of(model.head, dtype=dtype)
        self.made_of = fingerprint(model)

    @staticmethod
    def stack_of(model: nn.Module) -> Transformer:
        """The blocks that run in every step."""
        raise NotImplementedError

    def is_current(self) -> bool:
        """Has no parameter changed or been replaced since?"""
        before, now = self.made_of, fingerprint(self.model)
        return len(before) == len(now) and all(a is b and x == y for (a, *x), (b, *y) in zip(before, now, strict=True))

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        cache: Cache,
        context: list[KeysValues] | None = None,
        context_mask: Tensor | None = None,
        between: Between | None = None,
    ) -> Tensor:
        """x (B, D), after `cache.begin(1)` gave its positions → (B, D). context: of `Transformer.context_keys_values`, with its
        mask (B, S); between: see `Transformer`, whose layers between the blocks are not packed."""
        stack = self.stack
        rope = stack.rotary(positions)
        rope = None if rope is None else rope.to(self.dtype)
        bias = None if stack.relative is None else stack.relative(positions, cache.width)
        attention = stack.blocks[0].attention
        past = Visible.of(cache.visible, bias, x, attention, self.dtype)
        source = Visible.of(expand_mask(context_mask), None, x, attention, self.dtype)
        for index, block in enumerate(self.blocks):
            if between is not None:
                x = between(index, x[:, None])[:, 0]
            x = block(x, rope, cache.layer(index), past, None if context is None else context[index], source)
        cache.advance(None, 1)
        return x


class PackedDecoder(Packed):
    """One step of a `LanguageModel`: tokens (B,), the cache → logits (B, V); the tokens are appended to the cache."""

    reads = False

    @staticmethod
    def stack_of(model: nn.Module) -> Transformer:
        return model.transformer

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__(model, dtype)
        self.project_out = None if model.project_out is None else Matrix.of(model.project_out, dtype=dtype)

    def __call__(self, tokens: Tensor, cache: Cache, between: Between | None = None) -> Tensor:
        model = self.model
        x = model.embed(tokens)  # (B, D)
        positions = cache.begin(1)  # (1,), or (B, 1)
        if model.position_embedding is not None:
            x = x + model.position_embedding(positions[..., 0] + model.config.position_offset)
        x = self.run(x, positions, cache, between=between)
        x = x if model.norm is None else model.norm(x)
        return self.head(x if self.project_out is None else self.project_out(x))


class PackedT5(Packed):
    """The same for a T5, which also attends to what its encoder made of a text: see `T5.states`."""

    reads = True

    @staticmethod
    def stack_of(model: nn.Module) -> Transformer:
        return model.decoder

    def __call__(self, tokens: Tensor, cache: Cache, context: list[KeysValues], mask: Tensor | None) -> Tensor:
        model = self.model
        x = self.run(model.embed(tokens), cache.begin(1), cache, context, mask)
        x = model.decoder_norm(x)
        return self.head(x * model.config.width**-0.5 if model.config.scale_head else x)


class PackedBlock:
    """x (B, D) → (B, D): `Block` for one token a row."""

    def __init__(self, block: Block, dtype: torch.dtype):
        attention, cross, mlp = block.attention, block.cross_attention, block.mlp
        self.block = block  # its norms and its sizes
        self.qkv = Matrix.of(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype)
        self.out = Matrix.of(attention.out_proj, dtype=dtype)
        if cross is not None:
            self.cross_q, self.cross_out = Matrix.of(cross.q_proj, dtype=dtype), Matrix.of(cross.out_proj, dtype=dtype)
        ups = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
        self.up = Matrix.of(*ups, dtype=dtype)
        wide = getattr(mlp.down_proj, "base", mlp.down_proj).weight.dtype  # a T5 in fp16 has it in fp32
        self.down = Matrix.of(mlp.down_proj, dtype=wide if dtype == torch.float16 and wide == torch.float32 else dtype)

    def __call__(
        self,
        x: Tensor,
        rope: Rotary | None,
        cache: LayerCache,
        past: Visible,
        context: KeysValues | None,
        source: Visible,
    ) -> Tensor:
        """past, source: which of the cache's columns, and of the context, each row may attend to."""
        b = self.block
        if b.parallel:
            return x + self.attention(b.attention_norm(x), rope, cache, past) + self.mlp(b.mlp_norm(x))
        kept = bound if b.bounded else lambda x: x
        if b.pre_norm:
            x = kept(x + self.attention(b.attention_norm(x), rope, cache, past))
            x = x if context is None else kept(x + self.cross_attention(b.cross_attention_norm(x), context, source))
            return kept(x + self.mlp(b.mlp_norm(x)))
        x = b.attention_norm(x + self.attention(x, rope, cache, past))
        x = x if context is None else b.cross_attention_norm(x + self.cross_attention(x, context, source))
        return b.mlp_norm(x + self.mlp(x))

    def attention(self, x: Tensor, rope: Rotary | None, cache: LayerCache, past: Visible) -> Tensor:
        a = self.block.attention
        H, G = a.heads, a.kv_heads
        qkv = self.qkv(x).view(len(x), H + 2 * G, 1, a.head_width)
        qk = qkv[:, : H + G] if rope is None else rope(qkv[:, : H + G])
        k, v, _ = cache.append(qk[:, H:], qkv[:, H + G :])  # (B, G, S, K): all so far
        return self.out(past.attend(a, qk[:, :H], k, v))

    def cross_attention(self, x: Tensor, context: KeysValues, source: Visible) -> Tensor:
        a = self.block.cross_attention
        q = self.cross_q(x).view(len(x), a.heads, 1, a.head_width)
        return self.cross_out(source.attend(a, q, *context))

    def mlp(self, x: Tensor) -> Tensor:
        mlp = self.block.mlp
        if mlp.gate_proj is None:
            return self.down(mlp.activation(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=1)
        return self.down(mlp.activation(gate).mul_(up))


class Visible(NamedTuple):
    """What the one query of each row attends to in a step, the same in all blocks."""

    mask: Tensor | None  # broadcastable to (B, H, 1, S), True = may be attended to; None: everything
    bias: Tensor | None  # likewise, added to the scores
    added: Tensor | None  # both in one, as `attend_to_past` takes it; on a CPU

    @classmethod
    def of(cls, mask: Tensor | None, bias: Tensor | None, x: Tensor, a: Attention, dtype: torch.dtype) -> Visible:
        """For x (B, D) and attention like `a`."""
        if x.device.type != "cpu":
            return cls(mask, bias, None)
        added = torch.zeros(1, 1, 1, 1, dtype=dtype) if bias is None else bias.to(dtype)
        if mask is not None:
            added = added.masked_fill(~mask, -torch.inf)
        if added.shape[:2] == (1, 1):
            return cls(mask, bias, added[0])
        groups = a.kv_heads if bias is None else a.heads
        added = added.expand(len(x), groups, 1, -1)
        return cls(mask, bias, added.reshape(len(x) * a.kv_heads, -1, added.shape[-1]))

    def attend(self, a: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, 1, K), k and v (B, G, S, K) → (B, H·K)."""
        if self.added is None:
            y = attend(q, k, v, mask=self.mask, bias=self.bias, scale=a.scale, backend=a.backend)
            return y.flatten(1)
        return attend_to_past(q, k, v, self.added, a.scale)


def attend_to_past(q: Tensor, k: Tensor, v: Tensor, added: Tensor, scale: float | None = None) -> Tensor:
    """`attend` for one query a row: q (B, H, 1, K), k and v (B, G, S, K) → (B, H·K).

    added: to the scores, (1, 1, 1 or S) or (B·G, 1 or H/G, S), −∞ where a row may not attend to.
    On a CPU as fast as PyTorch's fused kernel (batch 1), 1.2 times as fast (batch 8), or 3 times (bf16).
    """
    (B, H, _, K), G = q.shape, k.shape[1]
    q, k, v = q.reshape(B * G, H // G, K), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=K**-0.5 if scale is None else scale)  # (B·G, H/G, S)
    return torch.bmm(scores.softmax(dim=-1), v).view(B, H * K)


class Matrix(NamedTuple):
    """x (B, I) → (B, O), as one nn.Linear or several side by side."""

    weight: Tensor  # (I, O); or (O, I) in oneDNN's blocks
    bias: Tensor | None  # (O,)

    @classmethod
    def of(cls, *linears: nn.Module, dtype: torch.dtype) -> Matrix:
        weight = torch.cat([linear.weight.detach() for linear in linears]).to(dtype)  # (O, I)
        bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears]).to(dtype)
        if in_blocks(weight.device, dtype):
            return cls(torch.ops.mkldnn._reorder_linear_weight(weight, 1), bias)
        return cls(weight.T.contiguous(), bias)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if self.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


def in_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """In bf16 on a CPU, oneDNN brings a weight into blocks before every product, which takes most of the time for a single
    row. So it is done once, by what torch.compile calls where weights are frozen."""
    possible = device.type == "cpu" and dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    needed = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")  # PyTorch's own, not public
    return (
        possible
        and all(hasattr(torch.ops.mkldnn, name) for name in needed)
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def fingerprint(model: nn.Module) -> list[tuple]:
    """Each parameter with the number of its changes and where its memory lies."""
    return [(p, p._version, p.data_ptr()) for p in model.parameters()]


def can_be_packed(model: nn.Module, packed_class: type[Packed]) -> bool:
    """Not while it trains, not with other blocks, not while someone records its attention, and not if it is too large."""
    if model.training or sum(p.nbytes for p in model.parameters()) > LARGEST:
        return False
    stack, reads = packed_class.stack_of(model), packed_class.reads
    plain = all(type(block) is Block and (reads or block.cross_attention is None) for block in stack.blocks)
    attentions = [m for m in stack.modules() if isinstance(m, Attention)]
    return plain and not any(m.q_norm is not None or callable(m.backend) for m in attentions)
