"""Heads that copy from the context: where they look before any training. What they are good for is a score of the recipe
`lm`, "new words"."""

from dataclasses import replace

import pytest
import torch

from minivlm.layers import T5, LanguageModel, LanguageModelConfig, T5Config
from minivlm.layers.induction import NEIGHBOURS, OFFSETS, give_induction_heads
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

T5_CONFIG = T5Config(width=128, depth=3, heads=8, vocab_size=60, scale_head=True)


def t5_maps(seed=0, given=True):
    """What a T5 that reads sixteen tokens twice, and says the first half of them, attends to."""
    model = T5(T5_CONFIG, seed=seed)
    if given:
        give_induction_heads(model, torch.Generator().manual_seed(seed))
    tokens = torch.stack([torch.randperm(59)[:16] + 1 for _ in range(64)])
    with torch.no_grad(), record_attention(model.eval()) as maps:
        model(tokens.repeat(1, 2), labels=tokens[:, :8])
    return maps


def test_a_t5_looks_at_the_neighbours():
    [weights] = t5_maps()["encoder.blocks.0.attention"]
    for head, offset in enumerate(NEIGHBOURS):
        assert weights[:, head].diagonal(-offset, dim1=1, dim2=2).min() > 0.85


@pytest.mark.parametrize("seed", range(3))
def test_and_looks_up_where_the_neighbour_was_the_word_read(seed):
    query = torch.arange(4, 12)
    there = {}
    for given in (True, False):
        [weights] = t5_maps(seed, given)["encoder.blocks.1.attention"]
        found = [weights[:, 4 + h, query, query + 16 + d].mean() for h, d in enumerate(NEIGHBOURS)]
        there[given] = torch.stack(found).min()
    assert there[True] > 0.2 > 0.1 > there[False]  # of 32 places


@pytest.mark.parametrize("seed", range(3))
def test_its_decoder_looks_up_what_came_after_the_word_said(seed):
    said = torch.arange(1, 8)  # position i has heard token i − 1
    after = {}
    for given in (True, False):
        [weights] = t5_maps(seed, given)["decoder.blocks.0.cross_attention"]
        after[given] = (weights[:, 0, said, said] + weights[:, 0, said, said + 16]).mean()
    assert after[True] > 0.4 > 0.15 > after[False]


@pytest.mark.parametrize("changes", [{"depth": 1}, {"heads": 4}, {"relative_buckets": 12}])
def test_what_a_t5_needs(changes):
    with pytest.raises(ValueError, match="need two blocks, 8 heads, and 16 relative buckets"):
        give_induction_heads(T5(replace(T5_CONFIG, **changes)), torch.Generator())
