"""Heads that look up what came after the same word before, given to a language model at the start.

    … red dax . blue wug . red ?            block 0: a head at each token copies which word stood 1, 2 or 3 before
        ▲   ▲                │              block 1: the query "red" finds the token after "red"  → "dax"
        └ 1 ┘ ◄──────────────┘              and what stands there is what comes next: "dax"

Large language models grow such pairs of heads by themselves, all at once and late (Olsson et al. 2022, "In-context Learning
and Induction Heads"). In a small one, trained for minutes, the moment does not come: in a trial on the shapes world's
lessons a model of four blocks did not know after 600 steps which of two new words names an object (53 %, chance 50 %);
started with them, and on texts of which lessons were a third, it did after 150 (93 %; one seed each).
Everything stays trainable; starting attention with the structure that training would find is mimetic initialisation
(Trockman & Kolter 2023, "Mimetic Initialization of Self-Attention Layers").

A T5's encoder attends to both sides. What a decoder alone does in one stack is done in two, and a sentinel token, or the end
of the encoder's text, is where an answer belongs:

    encoder   red circle: dax. blue star: wug. red circle: □     block 0: which words stand 1 to 3 before, and 1 after?
                          ▲                                │     block 1: where are the words 2 and 3 before the same as
                          └────────────────────────────────┘     mine? The sentinel □ copies what stands there
    decoder   □ d           □ finds the sentinel of the encoder, and generates what it copied: "d"
                d ax        and "d" finds what followed it in the encoder's text: "ax"

Heads of a T5 know distances alone, by one table for all blocks, so heads 0 to 3 attend to neighbours, and heads 4 to 7 to
equal contexts. After 200 steps of span corruption a small T5 knew the first token of the missing word for 84 % of a lesson's
sentinels, without such heads for 38 %, which is chance; for answers of a conversation 64 % and 29 % (one seed each).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivlm.layers.attention import Attention
from minivlm.layers.initialise import normal
from minivlm.layers.language_model import LanguageModel
from minivlm.layers.position import relative_bucket
from minivlm.layers.t5 import T5

OFFSETS = (1, 2, 3)  # how far before a token its heads of block 0 attend, one head each
SHARPNESS = 5.0  # of that attention: nine tenths of it are where they should be
COPY_SCALE = 0.5  # of what is copied from there, beside the token itself
NEIGHBOURS = (1, 2, 3, -1)  # the same for a T5; negative: after the token
NEARNESS = 8.0  # by how much the right neighbour's score exceeds the others' in a T5
CONTEXT = (2, 3)  # the neighbours that two tokens have to share, for one to copy the other
NEIGHBOUR_SCALE, FOUND_SCALE = 1.4, 3.0  # of what is copied from neighbours, and from equal contexts


@torch.no_grad()
def give_induction_heads(model: LanguageModel | T5, generator: torch.Generator) -> None:
    """In place, before training. Raises ValueError for a model with too few blocks or heads, and for a language model
    without rotary positions and biases.

    Tokens start five times as large as GPT-2's, so that they are not drowned by what the first block adds; those of a
    T5 whose head is scaled down are larger still.
    """
    (give_to_t5 if isinstance(model, T5) else give_to_decoder)(model, generator)


def give_to_decoder(model: LanguageModel, generator: torch.Generator) -> None:
    """Block 0 copies the tokens before, block 1 finds equal ones: the first drawing above."""
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
        copy_from_before(first, rows, offset, c.rope_theta)
        written = first.out_proj.weight[:, rows] @ first.v_proj.weight[rows]  # (D, D): what it copies of a token
        find_equal(second, rows, written)


def copy_from_before(attention: Attention, rows: slice, offset: int, theta: float) -> None:
    """A head that attends `offset` tokens back: its query is the same everywhere, its key is the query turned by as much.

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
    out *= COPY_SCALE * len(out) ** -0.5 / out.std()


def find_equal(attention: Attention, rows: slice, written: Tensor) -> None:
    """A head whose key of what `copy_from_before` wrote (D, D) equals its query of the same token; its output is what it finds.

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
    """The second drawing above.

    The D channels are turned and cut into parts of K, the width of a head. A token starts in the last of them, of which
    heads use one part, its code. What a head copies of another token, it writes as a code into a part of its own.
    """
    c, n = model.config, len(NEIGHBOURS)
    K, least = model.encoder.blocks[0].attention.head_width, 4 * (max(NEIGHBOURS) + 1)
    if c.depth < 2 or c.heads < 2 * n or c.width < (n + 2) * K or c.relative_buckets < least:
        raise ValueError(
            f"a T5's induction heads need two blocks, {2 * n} heads, {n + 2} times as much width as a head's, and {least} "
            "relative buckets"
        )
    first, second = (block.attention for block in model.encoder.blocks[:2])
    turned = torch.linalg.qr(torch.randn(c.width, c.width, generator=generator)).Q
    *neighbours, found, code = turned.split(K, dim=1)[: n + 2]  # (D, K) each
    confine_tokens(model, turned[:, (n + 1) * K :])
    size = model.token_embedding.weight.std()
    for head, offset in enumerate(NEIGHBOURS):
        prefer(model, head, offset, NEARNESS)
        connect(first, head, key=torch.zeros_like(code), value=code, out=NEIGHBOUR_SCALE * size * neighbours[head])
    for head, offset in enumerate(NEIGHBOURS, start=n):
        if offset == CONTEXT[0]:
            prefer(model, head, 0, -2 * NEARNESS)  # another token
            context = sum(neighbours[NEIGHBOURS.index(offset)] for offset in CONTEXT)
            connect(second, head, query=K**-0.5 * context, key=context, value=code, out=FOUND_SCALE * size * found)
        else:
            prefer(model, head, -offset, -2 * NEARNESS)  # the neighbour of another
            value = second.v_proj.weight[head * K : (head + 1) * K].T
            connect(second, head, query=K**-0.5 * code, key=neighbours[head - n], out=0.5 * value)
    out = FOUND_SCALE * size * code
    cross = model.decoder.blocks[0].cross_attention
    connect(cross, 0, query=K**-0.5 * code, key=neighbours[NEIGHBOURS.index(1)], value=code, out=out)
    connect(cross, 1, query=K**-0.5 * code, key=code, value=found, out=out)


def confine_tokens(model: T5, channels: Tensor) -> None:
    """The embeddings, as large as before, lie in the span of these C directions (D, C) alone. The decoder's start token gets
    the embedding of the end token, so that the decoder first finds the end of the encoder's text."""
    c, tokens = model.config, model.token_embedding.weight
    if not c.scale_head:
        tokens *= 0.1 / tokens.std()
    inside = tokens @ channels @ channels.T
    tokens.copy_(inside * tokens.std() / inside.std())
    if c.end_tokens:
        tokens[c.start_token] = tokens[c.end_tokens[0]]


def prefer(model: T5, head: int, offset: int, score: float) -> None:
    """What a head of the encoder adds to the score of the token that stands `offset` before its own."""
    c = model.config
    bucket = relative_bucket(torch.tensor(-offset), c.relative_buckets, c.relative_distance, both_sides=True)
    model.encoder.relative.table.weight[bucket, head] = score


def connect(attention: Attention, head: int, *, out: Tensor, **inputs: Tensor) -> None:
    """One head's weights, each (D, K): what `out` writes, and what query, key and value take in, as far as they are given."""
    rows = slice(head * attention.head_width, (head + 1) * attention.head_width)
    attention.out_proj.weight[:, rows] = out
    for name, weight in inputs.items():
        getattr(attention, f"{name[0]}_proj").weight[rows] = weight.T
