"""Attention: one module for self- and cross-attention, causal or not, grouped-query, rotary, with or without a cache.

    x (B, T, D) ─ q_proj ─→ q (B, H, T, K) ─┐
    context     ─ k_proj ─→ k (B, G, S, K) ─┼─ attend ─→ (B, H, T, K) ─ out_proj ─→ (B, T, D)
    (B, S, C)   ─ v_proj ─→ v (B, G, S, K) ─┘             softmax(q kᵀ / √K) v

The sum itself, `attend`, has a backend to read (`reference`) and two to run (`fused`, `flex`). They agree, and a test says so.
Vaswani et al. 2017, "Attention Is All You Need", §3.2; grouped queries: Ainslie et al. 2023; rotary: Su et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.autocast import cast_once
from minivlm.layers.position import LayerCache, Rotary

BACKENDS = ("auto", "reference", "fused", "flex")
KeysValues = tuple[Tensor, Tensor]  # each (B, G, S, K)
QKNorm = Literal["layernorm", "rmsnorm", "wide_layernorm"]
Backend = str | Callable[..., Tensor]  # a function is called as `attend_reference` is; see `minivlm.recording`


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """softmax(q kᵀ / √K) v over the positions that may be attended to.

    q (B, H, T, K), k and v (B, G, S, K) with H a multiple of G → (B, H, T, K).
    mask: boolean, broadcastable to (B, H, T, S), True = may be attended to. causal: query t sees keys ≤ t + S − T.
    bias: added to the scores, broadcastable to (B, H, T, S). scale: of the scores; None: 1/√K.
    A query that may attend to nothing gets zeros.
    """
    if backend == "auto":
        backend = "reference" if plain_is_faster(q, k) else "fused"
        if backend == "reference" and causal and mask is None and bias is None and q.shape[2] <= k.shape[2]:
            return attend_in_strips(q, k, v, scale=scale, dropout=dropout)
    run = {"reference": attend_reference, "fused": attend_fused, "flex": attend_flex}.get(backend, backend)
    return run(q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, dropout=dropout)


def plain_is_faster(q: Tensor, k: Tensor) -> bool:
    """On a CPU in bf16, for one query and below some hundred keys, PyTorch's fused kernel is 3 to 6 times slower."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and (q.shape[-2] == 1 or k.shape[-2] <= 768)


def attend_reference(q, k, v, *, mask=None, causal=False, bias=None, scale=None, dropout=0.0) -> Tensor:
    """The formula as it is written; every fast twin is held against it."""
    weights = attention_weights(q, k, mask=mask, causal=causal, bias=bias, scale=scale)  # (B, H, T, S)
    if dropout:
        weights = F.dropout(weights, dropout)
    (B, H, T, S), G = weights.shape, k.shape[1]
    return (weights.view(B, G, H // G * T, S) @ v).view(B, H, T, v.shape[-1])


def attention_weights(q, k, *, mask=None, causal=False, bias=None, scale=None) -> Tensor:
    """softmax(q kᵀ / √K), (B, H, T, S): how much of its attention each query gives to each key."""
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    q = q.reshape(B, G, H // G * T, K)  # the H/G query heads of a group share its keys
    scores = ((q * (K**-0.5 if scale is None else scale)) @ k.transpose(-2, -1)).view(B, H, T, S)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if (allowed := combine(mask, causal, T, S, q.device)) is not None:
        shut = ~allowed
        # Adding costs what masked_fill would, but nothing in backward.
        scores += torch.zeros_like(shut, dtype=scores.dtype).masked_fill_(shut, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None or (causal and T > S):  # where all is shut, the softmax is even; but it attends to nothing
        weights = weights.masked_fill(shut, 0.0)
    return weights


def attend_in_strips(q, k, v, *, scale=None, dropout=0.0, height: int = 160) -> Tensor:
    """Causal attention, `height` queries at a time with the keys up to the last of them: most of the upper right half,
    which would be masked, is never computed. Scale and mask come with the product (baddbmm), at no cost of their own."""
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    k, v = k.reshape(B * G, S, K).transpose(1, 2), v.reshape(B * G, S, K)
    strips, end, scale = [], S - T, K**-0.5 if scale is None else scale
    for queries in q.split(height, dim=2):
        n = queries.shape[2]
        end += n
        keys, values = (k, v) if end == S else (k[..., :end], v[:, :end])
        future = torch.full((n, end), -torch.inf, dtype=q.dtype, device=q.device).triu(end - n + 1)
        queries = queries.reshape(B * G, H // G * n, K)
        weights = torch.baddbmm(future.repeat(H // G, 1), queries, keys, alpha=scale).softmax(dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        strips.append((weights @ values).view(B, H, n, K))
    return torch.cat(strips, dim=2)


def attend_fused(q, k, v, *, mask=None, causal=False, bias=None, scale=None, dropout=0.0) -> Tensor:
    """The same through PyTorch's fused kernels (FlashAttention and its kin, Dao et al. 2022)."""
    T, S = q.shape[2], k.shape[2]
    options = dict(dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    allowed = None if causal and mask is None and bias is None and T == S else combine(mask, causal, T, S, q.device)
    if allowed is None and bias is None:
        if causal and T > 1:  # an `if`, as is_causal has to be a plain bool where lengths are symbols (torch.compile)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return F.scaled_dot_product_attention(q, k, v, **options)
    shut = allowed
    if bias is not None:
        bias = bias.to(q.dtype)
        shut = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=shut, **options)
    if mask is not None or (causal and T > S):  # kernels differ in what they give for a row that may attend to nothing
        y = y.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
    return y


def attend_flex(q, k, v, *, mask=None, causal=False, bias=None, scale=None, dropout=0.0) -> Tensor:
    """The same through FlexAttention (Dong et al. 2024), which passes over blocks of 128 queries and 128 keys where all is
    shut: for texts that see one image of many. Never chosen by "auto", as it has not been measured on a GPU yet.

    Elsewhere than on CUDA it is not compiled, and PyTorch has no gradients of it. Raises ValueError for dropout.
    """
    if dropout:
        raise ValueError('FlexAttention has no dropout: choose the backend "fused", or dropout 0')
    (B, H, T, _), S = q.shape, k.shape[2]
    flex, block_mask_of = flex_attention(q.device.type)
    blocks = change = None
    if (allowed := combine(mask, causal, T, S, q.device)) is not None:
        allowed = allowed.expand(B, H, T, S)
        blocks = block_mask_of(lambda b, h, i, j: allowed[b, h, i, j], B, H, T, S, device=q.device)
    if bias is not None:
        bias = bias.expand(B, H, T, S)
        change = lambda score, b, h, i, j: score + bias[b, h, i, j]
    return flex(q, k, v, score_mod=change, block_mask=blocks, scale=scale, enable_gqa=k.shape[1] != H)


@cache
def flex_attention(device: str) -> tuple[Callable, Callable]:
    """PyTorch's flex_attention and create_block_mask, compiled for a GPU."""
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile if device == "cuda" else lambda function: function
    return compiled(flex.flex_attention), compiled(flex.create_block_mask)


def combine(mask: Tensor | None, causal: bool, T: int, S: int, device) -> Tensor | None:
    """The mask and the causal triangle as one boolean tensor, broadcastable to (B, H, T, S); None: all is allowed."""
    if not causal or T == 1:  # the last query sees every key
        return mask
    triangle = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return triangle if mask is None else mask & triangle


def expand_mask(mask: Tensor | None) -> Tensor | None:
    """(B, S) keys of each row, or (B, T, S) keys of each query → (B, 1, ·, S), as `attend` takes it; True = attended to."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (True = may be attended to), not {mask.dtype}")
    if mask.dim() == 4:
        return mask
    return mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]


def last_queries(x: Tensor | None, last: int) -> Tensor | None:
    """Of a mask or bias (…, T, S) the rows of the last queries; (…, 1, S) is the same for all."""
    return x if x is None or x.shape[-2] == 1 else x[..., -last:, :]


def normalise(norm: nn.Module | None, x: Tensor) -> Tensor:
    """x (…, H·K): each stretch of channels that is as wide as the norm, which is one head or all of them, by itself."""
    return x if norm is None else norm(x.unflatten(-1, (-1, norm.normalized_shape[0]))).flatten(-2)


class Attention(nn.Module):
    """softmax(QKᵀ/√K)V: every x asks, every context answers; without a context x asks itself.

    x (B, T, D), context (B, S, C) → (B, T, D).
    kv_heads: fewer key heads than query heads (grouped-query). causal: position t sees itself and what came before.
    qk_norm: of queries and keys, head by head, or over all heads ("wide"); it keeps scores from growing (Dehghani et al.
    2023, "Scaling Vision Transformers to 22 Billion Parameters", §2). rope: rotates q and k (see `Rotary`).
    bias, scale, backend: see `attend`. cache: gives the keys so far (see `Cache`).
    last: only so many of x ask, those at its end, and the result is (B, last, D); so does the bias.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_width: int | None = None,
        context_width: int | None = None,
        bias: bool = True,
        out_bias: bool = True,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        qk_norm: QKNorm | None = None,
        norm_eps: float = 1e-5,
        norm_bias: bool = True,
    ):
        super().__init__()
        kv_heads = kv_heads or heads
        if head_width is None and width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads; choose another, or give head_width")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width or width // heads
        self.causal, self.scale, self.dropout = causal, scale, dropout
        self.backend: Backend = "auto"
        context_width = context_width or width
        self.q_proj = nn.Linear(width, heads * self.head_width, bias=bias)
        self.k_proj = nn.Linear(context_width, kv_heads * self.head_width, bias=bias)
        self.v_proj = nn.Linear(context_width, kv_heads * self.head_width, bias=bias)
        self.out_proj = nn.Linear(heads * self.head_width, width, bias=out_bias)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            sizes = [n * self.head_width if qk_norm == "wide_layernorm" else self.head_width for n in (heads, kv_heads)]
            options = {"eps": norm_eps} if qk_norm == "rmsnorm" else {"eps": norm_eps, "bias": norm_bias}
            self.q_norm, self.k_norm = (
                (nn.RMSNorm if qk_norm == "rmsnorm" else nn.LayerNorm)(size, **options) for size in sizes
            )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        rope: Rotary | None = None,
        cache: LayerCache | None = None,
        last: int | None = None,
    ) -> Tensor:
        x = cast_once(x)
        asking = x if last is None else x[:, -last:]
        q = self.ask(asking)  # (B, H, T, K)
        k, v = self.remember(x if context is None else context)
        if rope is not None:
            q, k = rope.last(q.shape[2])(q), rope(k)
        mask, causal = expand_mask(mask), self.causal
        if cache is not None:
            k, v, mask = cache.append(k, v)  # all keys so far, and who may see them
            causal = mask is None  # else the cache's mask already says so
        if last is not None:
            mask, bias = last_queries(mask, last), last_queries(bias, last)
        return self.answer(q, k, v, mask=mask, causal=causal, bias=bias)

    def ask(self, x: Tensor) -> Tensor:
        """(B, T, D) → its queries (B, H, T, K)."""
        return self.split(normalise(self.q_norm, self.q_proj(x)), self.heads)

    def remember(self, context: Tensor) -> KeysValues:
        """(B, S, C) → its keys and values, each (B, G, S, K)."""
        context = cast_once(context)
        k = normalise(self.k_norm, self.k_proj(context))
        return self.split(k, self.kv_heads), self.split(self.v_proj(context), self.kv_heads)

    def answer(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        """Queries (B, H, T, K), keys and values (B, G, S, K) → (B, T, D). options: see `attend`."""
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, scale=self.scale, dropout=dropout, backend=self.backend, **options)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, H·K) → (B, T, D)

    @staticmethod
    def split(x: Tensor, heads: int) -> Tensor:
        """(B, T, H·K) → (B, H, T, K)"""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class CrossAttention(Attention):
    """Attention whose keys and values always come from elsewhere: x (B, T, D), context (B, S, C) → (B, T, D).

    A context that is read more than once is given as its keys and values, as `remember` makes them.
    """

    def forward(self, x: Tensor, context: Tensor | KeysValues, *, mask: Tensor | None = None) -> Tensor:
        q = self.ask(x)
        k, v = context if isinstance(context, tuple) else self.remember(context)
        return self.answer(q, k, v, mask=expand_mask(mask))


def set_attention_backend(model: nn.Module, backend: str) -> None:
    """Make every Attention inside `model` use "auto", "reference", "fused" or "flex"."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend
