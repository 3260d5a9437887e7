"""Alibi, norms of queries and keys, norms without biases: what the language models of OpenFlamingo and IDEFICS need."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import Attention, LanguageModel, LanguageModelConfig, Transformer, TransformerConfig
from minivlm.layers.transformer import Alibi
from minivlm.testing import (
    assert_cache_equals_full,
    assert_causal,
    assert_generation_independent,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_same,
)

CONFIG = TransformerConfig(width=16, depth=2, heads=4, causal=True, alibi=True)


def slopes(heads):
    return Alibi(replace(CONFIG, heads=heads)).slopes(torch.device("cpu")).flatten().tolist()


class TestAlibi:
    def test_the_slopes_of_the_paper(self):
        assert slopes(8) == [2**-i for i in range(1, 9)]
        assert slopes(4) == [2 ** -(2 * i) for i in range(1, 5)]

    def test_where_heads_are_no_power_of_two(self):
        eight = slopes(8)
        assert slopes(6) == [*eight[1::2], *eight[::2]][:6]
        assert slopes(1) == [2**-8]

    def test_the_bias(self):
        bias = Alibi(replace(CONFIG, heads=2))(torch.arange(3), 3)
        distance = torch.tensor([[0, 1, 2], [-1, 0, 1], [-2, -1, 0]])
        assert torch.equal(bias, torch.stack([distance * 2**-4, distance * 2**-8])[None])
        rows = Alibi(replace(CONFIG, heads=2))(torch.tensor([[2], [1]]), 3)  # one query a row
        assert torch.equal(rows[0, :, 0], bias[0, :, 2]) and torch.equal(rows[1, :, 0], bias[0, :, 1])

    def test_a_block_by_the_formula(self):
        stack, x = Transformer(replace(CONFIG, depth=1)), torch.randn(2, 6, 16)
        a, h = stack.blocks[0].attention, stack.blocks[0].attention_norm(x)
        q, k, v = (a.split(p(h), 4) for p in (a.q_proj, a.k_proj, a.v_proj))
        slope = torch.tensor([2.0 ** -(2 * i) for i in range(1, 5)])[:, None, None]
        distance = torch.arange(6)[:, None] - torch.arange(6)
        scores = q @ k.transpose(2, 3) / 2 - slope * distance
        y = scores.masked_fill(distance < 0, -torch.inf).softmax(dim=-1) @ v
        x = x + a.out_proj(y.transpose(1, 2).flatten(2))
        expected = x + stack.blocks[0].mlp(stack.blocks[0].mlp_norm(x))
        assert_same(stack(x - a.out_proj(y.transpose(1, 2).flatten(2))), expected)

    def test_a_cache_makes_no_difference(self):
        stack, x = Transformer(CONFIG).eval(), torch.randn(3, 9, 16)
        assert_causal(stack, x)
        assert_cache_equals_full(stack, x, lambda: stack.new_cache(3, 9), prompt_lengths=[4, 2, 5])

    def test_the_state_of_one_token_alone(self):
        stack, x = Transformer(CONFIG).eval(), torch.randn(3, 9, 16)
        assert_same(stack.state_at(x, torch.tensor([8, 3, 0])), stack(x)[range(3), [8, 3, 0]])


MPT = LanguageModelConfig(
    width=16, depth=2, heads=4, vocab_size=30, context=40, positions="none", alibi=True, norm_bias=False,
    qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm="wide_layernorm",
)  # fmt: skip


@pytest.mark.parametrize("config", [MPT, replace(MPT, qk_norm=None)], ids=["mosaic", "mpt"])
class TestLanguageModel:
    def model(self, config):
        model = LanguageModel(config).double().eval()
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p)
        return model

    def test_no_biases(self, config):
        assert not [n for n, _ in LanguageModel(config).named_parameters() if n.endswith("bias")]

    def test_padding_and_neighbours(self, config):
        model, tokens = self.model(config), torch.randint(3, 30, (3, 8))
        mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
        assert_padding_invariant(lambda t, m: model(t, m).logits, tokens, mask)
        generate = lambda t, m: model.generate(t, m, max_new_tokens=6)
        assert_generation_independent(generate, tokens, mask)

    def test_speaking_is_the_full_forward_again_and_again(self, config):
        model, tokens = self.model(config), torch.randint(3, 30, (2, 5))
        said = model.generate(tokens, max_new_tokens=6)
        for i in range(6):
            expected = model(torch.cat([tokens, said[:, :i]], dim=1)).logits[:, -1].argmax(dim=-1)
            assert torch.equal(expected, said[:, i])


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "wide_layernorm"])
class TestNormsOfQueriesAndKeys:
    def attention(self, kind):
        a = Attention(16, 4, kv_heads=2, qk_norm=kind, norm_eps=1e-3)
        for p in (*a.q_norm.parameters(), *a.k_norm.parameters()):
            p.data += 0.3 * torch.randn_like(p)
        return a

    def test_the_formula(self, kind):
        a, x = self.attention(kind), torch.randn(2, 5, 16)
        q, k, v = a.q_proj(x), a.k_proj(x), a.v_proj(x)
        if kind == "wide_layernorm":  # over all heads
            q = F.layer_norm(q, (16,), a.q_norm.weight, a.q_norm.bias, 1e-3)
            k = F.layer_norm(k, (8,), a.k_norm.weight, a.k_norm.bias, 1e-3)
        q, k, v = a.split(q, 4), a.split(k, 2), a.split(v, 2)
        if kind != "wide_layernorm":  # head by head
            q, k = a.q_norm(q), a.k_norm(k)
            assert a.q_norm.weight.shape == (4,)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = (q @ k.transpose(2, 3) / 2).softmax(dim=-1) @ v
        assert_same(a(x), a.out_proj(y.transpose(1, 2).flatten(2)))
        assert_gradient_reaches(
            a(x), {n: p for n, p in a.named_parameters() if n != "k_proj.bias" and n != "k_norm.bias"}
        )

    def test_scores_do_not_grow_with_x(self, kind):
        a, x = self.attention(kind), torch.randn(2, 5, 16)
        for p in (a.q_proj, a.k_proj):
            p.bias.data.zero_()
        sharp = Attention(16, 4, kv_heads=2, qk_norm=kind, norm_eps=1e-3)
        sharp.load_state_dict(a.state_dict())
        sharp.q_proj.weight.data *= 1000
        sharp.k_proj.weight.data *= 1000
        plain = Attention(16, 4, kv_heads=2)
        plain.load_state_dict({n: t for n, t in sharp.state_dict().items() if "norm" not in n})
        change = (sharp(x) - a(x)).abs().max()
        assert change < 0.02 < (plain(x) - a(x)).abs().max()


def test_between_stands_before_each_block():
    stack, x = Transformer(replace(CONFIG, depth=3)).eval(), torch.randn(2, 5, 16)
    shifts = torch.randn(3, 16)
    between = lambda i, x: x + shifts[i]
    y = x
    for i, block in enumerate(stack.blocks):
        y = block(y + shifts[i], bias=stack.relative(torch.arange(5), 5))
    assert_same(stack(x, between=between), y)
    f = lambda x, **options: stack(x, between=between, **options)
    assert_cache_equals_full(f, x, lambda: stack.new_cache(2, 5))
