"""Attention weights are recorded as they are, and nothing else changes."""

import pytest
import torch

from minivlm.layers import (
    T5,
    Attention,
    CrossAttention,
    LanguageModel,
    QFormer,
    QFormerConfig,
    T5Config,
    TextConfig,
)
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.recording import record_attention
from minivlm.testing import assert_same
from tests.languages import GPT2, QWEN2
from tests.speakers import VISION


def test_by_hand():
    attention, x = Attention(8, heads=2, causal=True), torch.randn(3, 5, 8)
    with record_attention(attention) as maps:
        y = attention(x)
    q, k = attention.split(attention.q_proj(x), 2), attention.split(attention.k_proj(x), 2)
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    [weights] = maps[""]
    assert_same(weights, scores.softmax(dim=-1))
    assert_same(y, attention(x))
    assert not weights.requires_grad and y.requires_grad


def test_rows_that_see_nothing_are_zero():
    attention = CrossAttention(8, heads=2)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    with record_attention(attention) as maps:
        attention(torch.randn(2, 4, 8), torch.randn(2, 3, 8), mask=mask)
    [weights] = maps[""]
    assert_same(weights.sum(dim=-1), torch.tensor([[[1.0] * 4] * 2, [[0.0] * 4] * 2]))
    assert not weights[0, ..., 2].any()


@pytest.mark.parametrize("config", [GPT2, QWEN2])
def test_a_model_that_speaks_says_the_same_and_every_step_is_kept(config):
    model, tokens = LanguageModel(config).eval(), torch.randint(30, (2, 6))
    said = model.generate(tokens, max_new_tokens=4)
    with record_attention(model) as maps:
        assert torch.equal(model.generate(tokens, max_new_tokens=4), said)
    kept = maps["transformer.blocks.0.attention"]
    assert [tuple(w.shape[:3]) for w in kept] == [(2, 4, 6, 6)[:3], *[(2, 4, 1)] * 3]


def test_the_weights_of_a_cached_step_are_the_last_row_of_the_whole():
    model, tokens = LanguageModel(GPT2).eval(), torch.randint(30, (2, 6))
    decoding = model.prefill(tokens[:, :5], room=1)
    with record_attention(model) as steps:
        decoding.step(tokens[:, 5])
    with record_attention(model) as whole:
        model(tokens)
    assert steps.keys() == whole.keys() and len(whole) == GPT2.depth
    for name in whole:
        [step], [full] = steps[name], whole[name]
        assert_same(step[..., :6], full[:, :, -1:])
        assert not step[..., 6:].any()  # columns of the cache that are not filled


def test_a_t5_is_recorded_with_its_biases_and_what_it_reads():
    config = T5Config(vocab_size=30, width=16, depth=2, heads=2, relative_buckets=8, relative_distance=6)
    model, tokens, labels = T5(config).eval(), torch.randint(30, (2, 6)), torch.randint(30, (2, 4))
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    said = model(tokens, mask, labels).logits
    with record_attention(model) as maps:
        assert_same(model(tokens, mask, labels).logits, said)
    own, cross = (f"decoder.blocks.1.{kind}attention" for kind in ("", "cross_"))
    shapes = {name: weights.shape for name, [weights] in maps.items()}
    assert len(maps) == 2 + 2 * 2 and shapes[own] == (2, 2, 4, 4) and shapes[cross] == (2, 2, 4, 6)
    assert not maps[cross][0][1, :, :, 3:].any()  # padding
    first = model.encoder.blocks[0]
    h = first.attention_norm(model.embed(tokens))
    q, k = (first.attention.split(p(h), 2) for p in (first.attention.q_proj, first.attention.k_proj))
    scores = q @ k.transpose(2, 3) + model.encoder.relative(torch.arange(6), 6)  # T5 does not scale them
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    assert_same(maps["encoder.blocks.0.attention"][0], scores.softmax(dim=-1))


def test_both_towers_of_a_clip_are_recorded():
    text = TextConfig(width=16, depth=1, heads=2, vocab_size=30, context=9, end_token=29)
    model = CLIP(CLIPConfig(vision=VISION, text=text, embed_width=8)).eval()
    images, tokens = torch.randn(2, 3, 16, 16), torch.tensor([[3, 4, 29, 0], [5, 29, 0, 0]])
    mask = tokens > 0
    seen, read = model.encode_image(images), model.encode_text(tokens, mask)
    with record_attention(model) as maps:
        assert_same(model.encode_image(images), seen)
        assert_same(model.encode_text(tokens, mask), read)
    assert sum(name.startswith("vision.") for name in maps) == 2 and sum(name.startswith("text.") for name in maps) == 1
    for name, [weights] in maps.items():
        assert_same(weights.sum(dim=-1), torch.ones(weights.shape[:-1]), name)


def test_only_what_is_asked_for():
    model = QFormer(QFormerConfig(width=8, depth=4, heads=2, queries=3, context_width=6)).eval()
    with record_attention(model, only=lambda name: name.endswith("cross_attention")) as maps:
        model(torch.randn(2, 5, 6))
    assert list(maps) == ["blocks.0.cross_attention", "blocks.2.cross_attention"]
    assert all(weights.shape == (2, 2, 3, 5) for [weights] in maps.values())


def test_backends_come_back_whatever_happens():
    attention = Attention(8, heads=2)
    attention.backend = "reference"
    with pytest.raises(RuntimeError, match="stop"), record_attention(attention):
        assert callable(attention.backend)
        raise RuntimeError("stop")
    assert attention.backend == "reference"
