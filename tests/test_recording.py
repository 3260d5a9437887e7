"""Attention weights are recorded as they are, and nothing else changes."""

import pytest
import torch

from minivlm.layers import Attention, CrossAttention, LanguageModel, QFormer, QFormerConfig
from minivlm.recording import record_attention
from minivlm.testing import assert_same
from tests.languages import GPT2, QWEN2


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
