"""Attention: one module for self- and cross-attention, causal or not, grouped-query, rotary, with or without a cache.

    x (B, T, D) ─ q_proj ─→ q (B, H, T, K) ─┐
    context     ─ k_proj ─→ k (B, G, S, K) ─┼─ attend ─→ (B, H, T, K) ─ out_proj ─→ (B, T, D)
    (B, S, C)   ─ v_proj ─→ v (B, G, S, K) ─┘             softmax(q kᵀ / √K) v

The sum itself, `attend`, has a backend to read (`reference`) and one to run (`fused`). They agree, and a test says so.
Vaswani et al. 2017, "Attention Is All You Need", §3.2; grouped queries: Ainslie et al. 2023; rotary: Su et al. 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("auto", "reference", "fused")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(q kᵀ / √K) v over the positions that may be attended to.

    q (B, H, T, K), k and v (B, G, S, K) with H a multiple of G → (B, H, T, K).
    mask: boolean, broadcastable to (B, H, T, S), True = may be attended to. causal: query t sees keys ≤ t + S − T.
    A query that may attend to nothing gets zeros.
    """
    if backend == "auto":
        backend = "reference" if plain_is_faster(q, k) else "fused"
        if backend == "reference" and causal and mask is None and q.shape[2] <= k.shape[2]:
            return attend_in_strips(q, k, v, dropout=dropout)
    if backend == "reference":
        return attend_reference(q, k, v, mask=mask, causal=causal, dropout=dropout)
    return attend_fused(q, k, v, mask=mask, causal=causal, dropout=dropout)


def plain_is_faster(q: Tensor, k: Tensor) -> bool:
    """On a CPU in bf16, for one query and below some hundred keys, PyTorch's fused kernel is 3 to 6 times slower."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and (q.shape[-2] == 1 or k.shape[-2] <= 768)


def attend_reference(q, k, v, *, mask=None, causal=False, dropout=0.0) -> Tensor:
    """The formula as it is written; every fast twin is held against it."""
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    q = q.reshape(B, G, H // G * T, K)  # the H/G query heads of a group share its keys
    scores = ((q * K**-0.5) @ k.transpose(-2, -1)).view(B, H, T, S)
    if (allowed := combine(mask, causal, T, S, q.device)) is not None:
        shut = ~allowed
        # Adding costs what masked_fill would, but nothing in backward.
        scores += torch.zeros_like(shut, dtype=scores.dtype).masked_fill_(shut, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None or (causal and T > S):  # where all is shut, the softmax is even; but it attends to nothing
        weights = weights.masked_fill(shut, 0.0)
    if dropout:
        weights = F.dropout(weights, dropout)
    return (weights.view(B, G, H // G * T, S) @ v).view(B, H, T, K)


def attend_in_strips(q, k, v, *, dropout=0.0, height: int = 160) -> Tensor:
    """Causal attention, `height` queries at a time with the keys up to the last of them: most of the upper right half,
    which would be masked, is never computed. Scale and mask come with the product (baddbmm), at no cost of their own."""
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    k, v = k.reshape(B * G, S, K).transpose(1, 2), v.reshape(B * G, S, K)
    strips, end = [], S - T
    for queries in q.split(height, dim=2):
        n = queries.shape[2]
        end += n
        keys, values = (k, v) if end == S else (k[..., :end], v[:, :end])
        future = torch.full((n, end), -torch.inf, dtype=q.dtype, device=q.device).triu(end - n + 1)
        queries = queries.reshape(B * G, H // G * n, K)
        weights = torch.baddbmm(future.repeat(H // G, 1), queries, keys, alpha=K**-0.5).softmax(dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        strips.append((weights @ values).view(B, H, n, K))
    return torch.cat(strips, dim=2)


def attend_fused(q, k, v, *, mask=None, causal=False, dropout=0.0) -> Tensor:
    """The same through PyTorch's fused kernels (FlashAttention and its kin, Dao et al. 2022)."""
    T, S = q.shape[2], k.shape[2]
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    allowed = None if causal and mask is None and T == S else combine(mask, causal, T, S, q.device)
    if allowed is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal and T > 1, **grouped)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout, **grouped)
    if mask is not None or T > S:  # kernels differ in what they give for a row that may attend to nothing
        y = y.masked_fill(~allowed.any(dim=-1, keepdim=True), 0.0)
    return y


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


class Attention(nn.Module):
    """softmax(QKᵀ/√K)V: every x asks, every context answers; without a context x asks itself.

    x (B, T, D), context (B, S, C) → (B, T, D).
    kv_heads: fewer key heads than query heads (grouped-query). causal: position t sees itself and what came before.
    rope: rotates q and k (see `Rotary`). cache: gives the keys so far (see `Cache`).
    last: only so many of x ask, those at its end, and the result is (B, last, D).
    backend: "auto", "reference" or "fused"; see `attend`.
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
        dropout: float = 0.0,
    ):
        super().__init__()
        kv_heads = kv_heads or heads
        if head_width is None and width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads; choose another, or give head_width")
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width or width // heads
        self.causal, self.dropout, self.backend = causal, dropout, "auto"
        context_width = context_width or width
        self.q_proj = nn.Linear(width, heads * self.head_width, bias=bias)
        self.k_proj = nn.Linear(context_width, kv_heads * self.head_width, bias=bias)
        self.v_proj = nn.Linear(context_width, kv_heads * self.head_width, bias=bias)
        self.out_proj = nn.Linear(heads * self.head_width, width, bias=out_bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask=None, rope=None, cache=None, last: int | None = None
    ) -> Tensor:
        source = x if context is None else context
        asking = x if last is None else x[:, -last:]
        q = self.split(self.q_proj(asking), self.heads)  # (B, H, T, K)
        k = self.split(self.k_proj(source), self.kv_heads)  # (B, G, S, K)
        v = self.split(self.v_proj(source), self.kv_heads)
        if rope is not None:
            q, k = rope.last(q.shape[2])(q), rope(k)
        mask, causal = expand_mask(mask), self.causal
        if cache is not None:
            k, v, mask = cache.append(k, v)  # all keys so far, and who may see them
            causal = mask is None  # else the cache's mask already says so
        if last is not None and mask is not None and mask.shape[-2] > 1:
            mask = mask[..., -last:, :]
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask=mask, causal=causal, dropout=dropout, backend=self.backend)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, T, H·K) → (B, T, D)

    @staticmethod
    def split(x: Tensor, heads: int) -> Tensor:
        """(B, T, H·K) → (B, H, T, K)"""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class CrossAttention(Attention):
    """Attention whose keys and values always come from elsewhere: x (B, T, D), context (B, S, C) → (B, T, D)."""

    def forward(self, x: Tensor, context: Tensor, *, mask=None) -> Tensor:
        return super().forward(x, context, mask=mask)


def set_attention_backend(model: nn.Module, backend: str) -> None:
    """Make every Attention inside `model` use "auto", "reference" or "fused"."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")
    for module in model.modules():
        if isinstance(module, Attention):
            module.backend = backend
