"""Attention: one module for self- and cross-attention, causal or not, grouped-query, rotary, with or without a cache.

    x (B, T, D) ─ q_proj ─→ q (B, H, T, K) ─┐
    context     ─ k_proj ─→ k (B, G, S, K) ─┼─ attend ─→ (B, H, T, K) ─ out_proj ─→ (B, T, D)
    (B, S, C)   ─ v_proj ─→ v (B, G, S, K) ─┘             softmax(q kᵀ / √K) v

The formula is `attend_reference`; `attend` chooses between it and its faster twins (attention_kernels.py).
Vaswani et al. 2017, "Attention Is All You Need", §3.2; grouped queries: Ainslie et al. 2023; rotary: Su et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.attention_kernels import attend_fused, attend_in_strips, plain_is_faster
from minivlm.layers.autocast import cast_once
from minivlm.layers.masks import combine, expand_mask
from minivlm.layers.position import LayerCache, Rotary

BACKENDS = ("auto", "reference", "fused")
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
    run = {"reference": attend_reference, "fused": attend_fused}.get(backend, backend)
    return run(q, k, v, mask=mask, causal=causal, bias=bias, scale=scale, dropout=dropout)


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


def normalise(norm: nn.Module | None, x: Tensor) -> Tensor:
    """x (…, H·K): each stretch of channels that is as wide as the norm, which is one head or all of them, by itself."""
    return x if norm is None else norm(x.unflatten(-1, (-1, norm.normalized_shape[0]))).flatten(-2)


class Attention(nn.Module):
    """softmax(QKᵀ/√K)V: every x queries every context; without a context x attends to itself.

    x (B, T, D), context (B, S, C) → (B, T, D).
    kv_heads: fewer key heads than query heads (grouped-query). causal: position t sees itself and what came before.
    qk_norm: of queries and keys, head by head, or over all heads ("wide"); it keeps scores from growing (Dehghani et al.
    2023, "Scaling Vision Transformers to 22 Billion Parameters", §2). rope: rotates q and k (see `Rotary`).
    bias, scale, backend: see `attend`. cache: gives the keys so far (see `Cache`).
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
    ) -> Tensor:
        x = cast_once(x)
        q = self.queries(x)  # (B, H, T, K)
        k, v = self.keys_values(x if context is None else context)
        if rope is not None:
            q, k = rope(q), rope(k)
        mask, causal = expand_mask(mask), self.causal
        if cache is not None:
            k, v, mask = cache.append(k, v)  # all keys so far, and which of them each query may attend to
            causal = mask is None  # else it is part of the cache's mask
        return self.attend(q, k, v, mask=mask, causal=causal, bias=bias)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, H, T, K)"""
        return self.split(normalise(self.q_norm, self.q_proj(x)), self.heads)

    def keys_values(self, context: Tensor) -> KeysValues:
        """(B, S, C) → keys and values, each (B, G, S, K)."""
        context = cast_once(context)
        k = normalise(self.k_norm, self.k_proj(context))
        return self.split(k, self.kv_heads), self.split(self.v_proj(context), self.kv_heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
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

    A context that is attended to more than once is given as its `keys_values`. mask (B, S) or (B, T, S): True = may be
    attended to. d_model and num_heads: other names of width and heads.
    """

    def __init__(self, *sizes: int, d_model: int | None = None, num_heads: int | None = None, **options):
        named = {"width": d_model, "heads": num_heads}
        super().__init__(*sizes, **{name: size for name, size in named.items() if size is not None}, **options)

    def forward(self, x: Tensor, context: Tensor | KeysValues, mask: Tensor | None = None) -> Tensor:
        q = self.queries(x)
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        return self.attend(q, k, v, mask=expand_mask(mask))


def set_attention_backend(model: nn.Module, backend: str) -> None:
    """Make every Attention inside `model` use "auto", "reference" or "fused"."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend
