"""Heads that copy from the context: where they look before any training. What they are good for is a score of the recipe
`lm`, "new words"."""

from dataclasses import replace

import pytest
import torch

from minivlm.layers import T5, LanguageModel, LanguageModelConfig, T5Config
from minivlm.layers.induction import CONTEXT, NEIGHBOURS, OFFSETS, give_induction_heads
from minivlm.recording import record_attention

CONFIG = LanguageModelConfig(width=128, depth=2, heads=4, vocab_size=60, context=64, rope_theta=10_000.0)


def with_heads(config=CONFIG, seed=0):
    model = LanguageModel(config, seed=seed)
    give_induction_heads(model, torch.Generator().manual_seed(seed))
    return model


def test_the_first_block_looks_back():
    model, tokens = with_heads().eval(), torch.randint(60, (4, 40))
    with torch.no_grad(), record_attention(model) as maps:
        model(tokens)
    [weights] = maps["transformer.blocks.0.attention"]  # (B, H, T, T)
    for head, offset in enumerate(OFFSETS):
        there = weights[:, head].diagonal(-offset, dim1=1, dim2=2)[:, 8:]
        assert there.min() > 0.85


def test_the_second_looks_up_what_came_after_the_same_token():
    """The scores of its first head: higher where the token before was this one than where it was another."""
    model = with_heads().eval()
    tokens = torch.stack([torch.randperm(60)[:16] for _ in range(32)]).repeat(1, 2)  # 16 tokens, and the same again
    query = torch.arange(20, 32)
    with torch.no_grad(), record_attention(model) as maps:
        model(tokens)
    [weights] = maps["transformer.blocks.1.attention"]
    after = weights[:, 0, query, query - 15]  # where this token stood before, one place further
    others = torch.stack([weights[:, 0, query, query - 15 + d] for d in (-5, -3, 3, 5)]).mean(dim=0)
    assert after.mean() > 1.5 * others.mean()


@pytest.mark.parametrize("seed", range(3))
def test_untouched_models_do_neither(seed):
    tokens = torch.stack([torch.randperm(60)[:16] for _ in range(32)]).repeat(1, 2)
    query = torch.arange(20, 32)
    back, up = {}, {}
    for name, model in (("given", with_heads(seed=seed)), ("untouched", LanguageModel(CONFIG, seed=seed))):
        with torch.no_grad(), record_attention(model.eval()) as maps:
            model(tokens)
        first, second = (maps[f"transformer.blocks.{i}.attention"][0] for i in range(2))
        back[name] = first[:, 0].diagonal(-1, dim1=1, dim2=2)[:, 8:].mean()
        up[name] = torch.stack([second[:, h, query, query - 16 + OFFSETS[h]] for h in range(3)]).mean()
    assert back["given"] > 0.85 and back["untouched"] < 0.2
    assert up["given"] > 1.3 * up["untouched"]  # 1.6 to 1.7 times


@pytest.mark.parametrize(
    "changes", [{"rope_theta": None}, {"qkv_bias": False}, {"kv_heads": 2}, {"depth": 1}, {"heads": 2}]
)
def test_what_they_need(changes):
    with pytest.raises(ValueError, match="induction heads need rotary positions, two blocks, and at least 3 heads"):
        with_heads(replace(CONFIG, **changes))


# ---- T5 --------------------------------------------------------------------------------------------------------------

T5_CONFIG = T5Config(width=128, depth=3, heads=8, vocab_size=60, scale_head=True, end_tokens=(3,))
END, HOLE = 3, 4


def t5(seed=0, given=True):
    model = T5(T5_CONFIG, seed=seed).eval()
    if given:
        give_induction_heads(model, torch.Generator().manual_seed(seed))
    return model


def lessons(n=64):
    """n texts "a b : d e . f g : h i ." in which eight pairs of words are bound to others, and then one of them again: "a b :"."""
    words = torch.stack([torch.randperm(50)[:32] + 10 for _ in range(n)]).view(n, 8, 4)
    stops = torch.tensor([8, 9]).expand(n, 8, 2)
    texts = torch.cat([words[..., :2], stops[..., :1], words[..., 2:], stops[..., 1:]], dim=-1)  # (n, 8, 6)
    return texts.flatten(1), texts[:, 2, :3], texts[:, 2, 3:5]


def maps_of(model, tokens, labels):
    with torch.no_grad(), record_attention(model) as maps:
        model(tokens, labels=labels)
    return {name: weights for name, [weights] in maps.items()}


def test_a_t5_looks_at_the_neighbours():
    texts, _, answer = lessons()
    weights = maps_of(t5(), texts, answer)["encoder.blocks.0.attention"]
    for head, offset in enumerate(NEIGHBOURS):
        assert weights[:, head].diagonal(-offset, dim1=1, dim2=2).min() > 0.85


@pytest.mark.parametrize("seed", range(3))
def test_and_looks_up_where_the_neighbour_was_the_word_read(seed):
    tokens = torch.stack([torch.randperm(50)[:16] + 10 for _ in range(64)])
    query, there = torch.arange(4, 12), {}
    for given in (True, False):
        weights = maps_of(t5(seed, given), tokens.repeat(1, 2), tokens[:, :4])["encoder.blocks.1.attention"]
        single = [(4 + h, d) for h, d in enumerate(NEIGHBOURS) if d != CONTEXT[0]]
        there[given] = min(weights[:, h, query, query + 16 + d].mean() for h, d in single)
    assert there[True] > 0.4 > 0.1 > there[False]  # of 32 places


@pytest.mark.parametrize("where", [HOLE, END])
@pytest.mark.parametrize("seed", range(3))
def test_where_an_answer_belongs_it_is_found_and_said(seed, where):
    """At the start, without any training: what the third pair is bound to is found, and said sooner than most words."""
    texts, pair, answer = lessons()
    read = torch.cat([texts, pair, torch.full((len(texts), 1), where)], dim=1)
    said = torch.cat([torch.full((len(texts), 1), HOLE), answer], dim=1) if where == HOLE else answer
    place, first = read.shape[1] - 1, said.shape[1] - 2  # where it belongs, and when its first word is to be said
    kept, found, after, ranks = {}, {}, {}, {}
    for given in (True, False):
        model = t5(seed, given)
        maps = maps_of(model, read, said)
        kept[given] = maps["encoder.blocks.1.attention"][:, 5, place, 2 * 6 + 3].mean()
        looks = maps["decoder.blocks.0.cross_attention"]
        found[given], after[given] = looks[:, 1, first, place].mean(), looks[:, 0, first + 1, 2 * 6 + 4].mean()
        with torch.no_grad():
            logits = model(read, labels=said).logits[:, first : first + 2, 10:]
        ranks[given] = (logits > logits.gather(2, answer[..., None] - 10)).sum(dim=2).float().mean()
    assert kept[True] > 0.5 > 0.1 > kept[False]
    assert found[True] > 0.12 > 0.04 > found[False]
    assert after[True] > 0.5 > 0.1 > after[False]
    assert ranks[True] < 16 < 22 < ranks[False]  # of 50


@pytest.mark.parametrize("changes", [{"depth": 1}, {"heads": 4}, {"head_width": 32}, {"relative_buckets": 12}])
def test_what_a_t5_needs(changes):
    with pytest.raises(
        ValueError, match="need two blocks, 8 heads, 6 times as much width as a head's, and 16 relative"
    ):
        give_induction_heads(T5(replace(T5_CONFIG, **changes)), torch.Generator())
