"""Faster ways to compute `attention.attend_reference`, and which of them is used where. A test holds all of them equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.layers.masks import combine


def plain_is_faster(q: Tensor, k: Tensor) -> bool:
    """On a CPU in bf16, for one query and below some hundred keys, PyTorch's fused kernel is 3 to 6 times slower."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and (q.shape[-2] == 1 or k.shape[-2] <= 768)


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


def attend_in_strips(q, k, v, *, scale=None, dropout=0.0, height: int = 160) -> Tensor:
    """Causal attention, `height` queries at a time with the keys up to the last of them.

    Most of the upper right half, which would be masked, is never computed. The product (baddbmm) brings scale and mask at
    no cost of their own.
    """
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
