"""Flamingo's layer between the blocks of a language model: text attends to images, through gates that are closed at first.

    x (B, T, D) ─┬─ norm ─→ queries ──────────┐                                  ┌─ norm ─ MLP ─ · tanh(gate) ─┐
                 │  images ─→ keys, values ───┴─ attention ─ · tanh(gate) ─ + ───┴──────────────────────────── + ─→ (B, T, D)
                 └────────────────────────────────────────────────────────┘

With both gates at zero, where they start, x comes out as it went in, to the bit.
Alayrac et al. 2022, "Flamingo", §3.1.2 and figure 4; which token attends to which image: §3.1.3 and figure 7.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from minivlm.layers.attention import CrossAttention, KeysValues, QKNorm
from minivlm.layers.mlp import MLP, Activation

AttendTo = Literal["last", "all"]


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """The defaults are Flamingo's; what is None is like the language model's blocks around it."""

    heads: int | None = None
    head_width: int | None = None  # None: width / heads
    mlp_width: int | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    activation: Activation = field(default="squared_relu", metadata={"before": "gelu"})
    gated_mlp: bool = False
    qk_norm: QKNorm | None = None
    gate: Literal["scalar", "channel"] = "scalar"  # one number for a whole sub-layer, or one for each of its channels


class GatedCrossAttention(nn.Module):
    """x (B, T, D), images (B, S, C), mask (B, T, S) with True = may be attended to → (B, T, D). S: all tokens of all images.

    A text token that attends to no image passes the attention half unchanged, and without images (None) all do. Images that
    are used more than once are given as `keys_values` returns them.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *earlier,
        context_width: int | None = None,
        mlp_width: int | None = None,
        config: GatedConfig | None = None,
    ):
        """context_width: of the images; None: width. heads, mlp_width: where the config names none. TypeError for the
        arguments of earlier versions, (width, context_width, config)."""
        super().__init__()
        if earlier:
            raise TypeError(
                "write GatedCrossAttention(width, heads, context_width=…, config=…): the second argument is the number of heads"
            )
        c = config or GatedConfig()
        norm = lambda: {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[c.norm](width, eps=c.norm_eps)
        gate = lambda: nn.Parameter(torch.zeros(width if c.gate == "channel" else 1))
        self.attention_norm = norm()
        self.attention = CrossAttention(
            width,
            c.heads or heads,
            head_width=c.head_width,
            context_width=context_width,
            bias=False,
            out_bias=False,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
        )
        self.attention_gate = gate()
        self.mlp_norm = norm()
        self.mlp = MLP(width, c.mlp_width or mlp_width or 4 * width, c.activation, gated=c.gated_mlp, bias=False)
        self.mlp_gate = gate()

    def forward(self, x: Tensor, images: Tensor | KeysValues | None, mask: Tensor | None = None) -> Tensor:
        if images is not None:
            x = x + self.attention_gate.tanh() * self.attention(self.attention_norm(x), images, mask=mask)
        return x + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(x))

    def keys_values(self, images: Tensor) -> KeysValues:
        """(B, S, C) → keys and values, each (B, H, S, K)."""
        return self.attention.keys_values(images)

    def openness(self) -> Tensor:
        """mean |tanh(gate)| of attention and MLP: (2,), 0 = closed."""
        return torch.stack([gate.detach().tanh().abs().mean() for gate in (self.attention_gate, self.mlp_gate)])


def image_mask(
    tokens: Tensor, image_token: int, images: int, *, latents: int = 1, attend_to: AttendTo = "last"
) -> Tensor:
    """Which tokens attend to which images: (B, T, I·L), True = may be attended to. tokens (B, T); I images of L latents each.

        attend_to    "last"           "all"
        image        1  2             1  2
        a            ·  ·             ·  ·       text before the first image attends to nothing
        <image>      ■  ·             ■  ·       a placeholder attends to its own image
        cat          ■  ·             ■  ·
        <image>      ·  ■             ■  ■
        dog          ·  ■             ■  ■
        <pad>        ·  ■             ■  ■       whatever padding attends to, nothing attends to padding

    The i-th placeholder of a row stands for its i-th image; no token attends to images beyond a row's placeholders.
    Alayrac et al. 2022, §3.1.3 and figure 7: attending to the last image alone generalises to more images than in training.
    """
    latest = (tokens == image_token).cumsum(dim=1)[..., None]  # (B, T, 1): number of the last image so far, 0 = none
    number = torch.arange(1, images + 1, device=tokens.device)
    match attend_to:
        case "last":
            visible = number == latest
        case "all":
            visible = number <= latest
        case _:
            raise ValueError(f"attend_to is {attend_to!r}; there are last and all")
    return visible.repeat_interleave(latents, dim=2)
