"""Heads that look up what came after the same word before, given to a language model at the start.

    … red dax . blue wug . red ?            block 0: a head at each place tells it which word stood 1, 2 or 3 before
        ▲   ▲                │              block 1: "red" asks: where did the word before read "red"?  → at "dax"
        └ 1 ┘ ◄──────────────┘              and what stands there is what comes next: "dax"

Large language models grow such pairs of heads by themselves, all at once and late (Olsson et al. 2022, "In-context Learning
and Induction Heads"). In a small one, trained for minutes, the moment does not come: in a trial on the shapes world's
lessons a model of four blocks did not know after 600 steps which of two new words belongs to a look (53 %, chance 50 %);
started in the right place, and on texts of which lessons were a third, it did after 150 (93 %; one seed each).
Everything stays trainable; starting attention with the structure that training would find is mimetic initialisation
(Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers").
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivlm.layers.attention import Attention
from minivlm.layers.initialise import normal
from minivlm.layers.language_model import LanguageModel

OFFSETS = (1, 2, 3)  # how far before a token its heads of block 0 look, one head each
SHARPNESS = 5.0  # of that look: nine tenths of the attention are where they should be
LOUDNESS = 0.5  # of what is found there, beside the token itself


@torch.no_grad()
def give_induction_heads(model: LanguageModel, generator: torch.Generator) -> None:
    """In place, before training. Raises ValueError for a model without rotary positions and biases, or with too few blocks.

    Tokens start five times as large as GPT-2's, so that they are still heard above what the first block adds.
    """
    c = model.config
    own_keys = c.kv_heads in (None, c.heads)
    if c.rope_theta is None or not c.qkv_bias or not own_keys or c.depth < 2 or c.heads < len(OFFSETS):
        raise ValueError(
            "induction heads need rotary positions, two blocks, and at least "
            f"{len(OFFSETS)} heads, each with keys and biases of its own"
        )
    normal(model.token_embedding.weight, 0.1, generator)
    if model.position_embedding is not None:
        normal(model.position_embedding.weight, 0.02, generator)
    first, second = (block.attention for block in model.transformer.blocks[:2])
    for head, offset in enumerate(OFFSETS):
        rows = slice(head * first.head_width, (head + 1) * first.head_width)
        look_back(first, rows, offset, c.rope_theta)
        written = first.out_proj.weight[:, rows] @ first.v_proj.weight[rows]  # (D, D): what it makes of a token
        look_up(second, rows, written)


def look_back(attention: Attention, rows: slice, offset: int, theta: float) -> None:
    """A head that looks `offset` tokens back: its query is the same everywhere, its key is the query turned by as much.

    Rotated by their positions (see `Rotary`), the two agree best where the key stands that far before the query. The first
    channels turn fast enough to tell neighbours apart.
    """
    half = attention.head_width // 2
    fast = half * 3 // 8
    angle = offset * theta ** (-torch.arange(fast) / half)
    query, key = torch.zeros(2, half), torch.zeros(2, half)  # first and second of each pair of channels
    query[0, :fast], key[0, :fast], key[1, :fast] = SHARPNESS, SHARPNESS * angle.cos(), SHARPNESS * angle.sin()
    attention.q_proj.weight[rows], attention.k_proj.weight[rows] = 0.0, 0.0
    attention.q_proj.bias[rows], attention.k_proj.bias[rows] = query.flatten(), key.flatten()
    out = attention.out_proj.weight[:, rows]
    out *= LOUDNESS * len(out) ** -0.5 / out.std()


def look_up(attention: Attention, rows: slice, written: Tensor) -> None:
    """A head whose key sees in what `look_back` wrote (D, D) what its query sees in a token; what it finds, it says.

    The slower half of the channels compares words alike from near and far; the others are left out.
    """
    query, width = attention.q_proj.weight[rows], attention.head_width
    query.view(2, width // 2, -1)[:, : width // 4] = 0.0
    key = query @ written.T
    attention.k_proj.weight[rows] = 2 * query.std() / key.std() * key
    query *= 2.0
    attention.out_proj.weight[:, rows] = 0.5 * attention.v_proj.weight[rows].T
