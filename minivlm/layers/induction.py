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

A T5 sees both sides. Its heads know distances alone, by one table for all blocks, so the heads that look at neighbours are
not those that look up; and its decoder, which says a word token by token, looks up in what the encoder has read:

    read   … red dax . blue wug . red ?     block 0: which word stands 1, 2 or 3 before, or 1 after?  (heads 0 to 3)
                ▲                           block 1: where was that the word read here?               (heads 4 to 7)
    said        └──────────── "d"           every block of the decoder: what came after "d"?          (head 0)

On texts with holes its loss in steps 120 to 160 was 1.55 with such heads, 1.72 without (one seed), and 1.26 with large
embeddings (`scale_head`), above which the first block is not louder.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivlm.layers.attention import Attention, CrossAttention
from minivlm.layers.initialise import normal
from minivlm.layers.language_model import LanguageModel
from minivlm.layers.position import relative_bucket
from minivlm.layers.t5 import T5

OFFSETS = (1, 2, 3)  # how far before a token its heads of block 0 look, one head each
SHARPNESS = 5.0  # of that look: nine tenths of the attention are where they should be
LOUDNESS = 0.5  # of what is found there, beside the token itself
NEIGHBOURS = (1, 2, 3, -1)  # the same for a T5; negative: after the token
NEARNESS = 8.0  # by how much the right neighbour's score exceeds the others' in a T5


@torch.no_grad()
def give_induction_heads(model: LanguageModel | T5, generator: torch.Generator) -> None:
    """In place, before training. Raises ValueError for a model with too few blocks or heads, and for a language model
    without rotary positions and biases.

    Tokens start five times as large as GPT-2's, so that they are still heard above what the first block adds; a T5's whose
    head is scaled down are larger still.
    """
    (give_to_t5 if isinstance(model, T5) else give_to_decoder)(model, generator)


def give_to_decoder(model: LanguageModel, generator: torch.Generator) -> None:
    """Block 0 looks back, block 1 looks up: the first drawing above."""
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


# ---- T5 --------------------------------------------------------------------------------------------------------------


def give_to_t5(model: T5, generator: torch.Generator) -> None:
    """The second drawing above."""
    c, n = model.config, len(NEIGHBOURS)
    if c.depth < 2 or c.heads < 2 * n or c.relative_buckets // 4 <= max(NEIGHBOURS):
        least = 4 * (max(NEIGHBOURS) + 1)
        raise ValueError(f"a T5's induction heads need two blocks, {2 * n} heads, and {least} relative buckets")
    if not c.scale_head:
        normal(model.token_embedding.weight, 0.1, generator)
    first, second = (block.attention for block in model.encoder.blocks[:2])
    width = first.head_width
    for head, offset in enumerate(NEIGHBOURS):
        rows = slice(head * width, (head + 1) * width)
        look_at_neighbour(model, first, head, rows, offset)
        find(second, slice(rows.start + n * width, rows.stop + n * width), first, rows)
        if offset == 1:
            for block in model.decoder.blocks:
                find(block.cross_attention, rows, first, rows)


def look_at_neighbour(model: T5, attention: Attention, head: int, rows: slice, offset: int) -> None:
    """A head whose scores depend on the distance alone, in block 0; in later blocks they begin there."""
    c = model.config
    bucket = relative_bucket(torch.tensor(-offset), c.relative_buckets, c.relative_distance, both_sides=True)
    model.encoder.relative.table.weight[bucket, head] = NEARNESS
    attention.k_proj.weight[rows] = 0.0
    out = attention.out_proj.weight[:, rows]
    out *= LOUDNESS * model.token_embedding.weight.std() * attention.head_width**-0.5 / out.std()


def find(attention: Attention | CrossAttention, rows: slice, neighbours: Attention, told: slice) -> None:
    """A head that compares what its query reads with what the key was `told` by a head of `neighbours`: both in the channels
    of that head, in which it heard the neighbour and passed it on. What it finds, it says."""
    out = neighbours.out_proj.weight[:, told]  # (D, K)
    attention.q_proj.weight[rows] = neighbours.v_proj.weight[told]
    attention.k_proj.weight[rows] = (out / out.norm(dim=0)).T
    attention.out_proj.weight[:, rows] = 0.5 * attention.v_proj.weight[rows].T
