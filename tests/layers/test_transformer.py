import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from minivlm.layers import Block, Transformer, TransformerConfig, set_attention_backend
from minivlm.layers.position import relative_bucket
from minivlm.testing import (
    assert_batch_independent,
    assert_cache_equals_full,
    assert_causal,
    assert_gradient_does_not_reach,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_permutation_equivariant,
    assert_same,
    assert_same_gradients,
)

B, T, D = 3, 7, 16
SMALL = TransformerConfig(width=D, depth=2, heads=4)
CAUSAL = replace(SMALL, causal=True)
LLAMA = replace(CAUSAL, kv_heads=2, rope_theta=1e4, norm="rmsnorm", gated_mlp=True, activation="silu", mlp_width=24)
BERT = replace(SMALL, norm_place="post")
READER = replace(SMALL, cross_attention_every=1, context_width=6)
MASK = torch.arange(T) < torch.tensor([[T], [2], [5]])


def x():
    return torch.randn(B, T, D)


class TestBlock:
    def test_parallel(self):
        """Attention and MLP have the same input."""
        config = replace(CAUSAL, parallel_residual=True)
        block, h = Block(config), x()
        y = h + block.attention(block.attention_norm(h), mask=MASK) + block.mlp(block.mlp_norm(h))
        assert_same(block(h, mask=MASK), y)
        with pytest.raises(ValueError, match="parallel_residual is for pre-norm"):
            Block(replace(config, norm_place="post"))

    def test_pre_norm(self):
        block, h = Block(SMALL), x()
        y = h + block.attention(block.attention_norm(h), mask=MASK)
        assert_same(block(h, mask=MASK), y + block.mlp(block.mlp_norm(y)))

    def test_post_norm(self):
        block, h = Block(BERT), x()
        y = block.attention_norm(h + block.attention(h, mask=MASK))
        assert_same(block(h, mask=MASK), block.mlp_norm(y + block.mlp(y)))

    @pytest.mark.parametrize("place", ["pre", "post"])
    def test_cross_attention_stands_between(self, place):
        block, h = Block(replace(READER, norm_place=place), cross_attention=True), x()
        context, context_mask = torch.randn(B, 5, 6), torch.arange(5) < torch.tensor([[5], [1], [3]])
        if place == "pre":
            y = h + block.attention(block.attention_norm(h))
            y = y + block.cross_attention(block.cross_attention_norm(y), context, mask=context_mask)
            y = y + block.mlp(block.mlp_norm(y))
        else:
            y = block.attention_norm(h + block.attention(h))
            y = block.cross_attention_norm(y + block.cross_attention(y, context, mask=context_mask))
            y = block.mlp_norm(y + block.mlp(y))
        assert_same(block(h, context, context_mask=context_mask), y)

    def test_without_a_context_cross_attention_is_passed_by(self):
        block, h = Block(READER, cross_attention=True), x()
        y = h + block.attention(block.attention_norm(h))
        y = y + block.mlp(block.mlp_norm(y))
        assert_same(block(h), y)
        assert_gradient_does_not_reach(block(h), block.cross_attention)

    def test_a_head_wider_than_its_share_in_both_attentions(self):
        config = TransformerConfig(width=10, depth=1, heads=3, head_width=4, cross_attention_every=1)
        block = Block(config, cross_attention=True)
        assert block.attention.q_proj.weight.shape == block.cross_attention.q_proj.weight.shape == (12, 10)

    def test_rmsnorm_is_its_formula(self):
        block, h = Block(LLAMA), x() * 3
        norm = block.attention_norm
        nn.init.normal_(norm.weight)
        expected = norm.weight * h / (h.square().mean(dim=-1, keepdim=True) + LLAMA.norm_eps).sqrt()
        assert_same(norm(h), expected)

    def test_biases_where_the_config_says(self):
        config = replace(SMALL, qkv_bias=True, out_bias=False, mlp_bias=False, norm="rmsnorm")
        biases = [name for name, _ in Block(config).named_parameters() if name.endswith("bias")]
        assert biases == ["attention.q_proj.bias", "attention.k_proj.bias", "attention.v_proj.bias"]

    def test_dropout_in_training_only(self):
        block, h = Block(replace(SMALL, dropout=0.5)), x()
        assert not torch.equal(block(h), block(h))
        block.eval()
        assert_same(block(h), torch.stack([block(h) for _ in range(3)]).mean(dim=0))

    def test_a_replaced_width_takes_the_mlp_along(self):
        assert Block(replace(SMALL, width=32)).mlp.up_proj.weight.shape == (128, 32)
        assert Block(replace(SMALL, mlp_width=24)).mlp.up_proj.weight.shape == (24, 16)


class TestTransformer:
    @pytest.mark.parametrize("config", [SMALL, LLAMA, BERT], ids=["small", "llama", "bert"])
    def test_gradients_reach_all(self, config):
        model = Transformer(config)
        weights = {
            n: p for n, p in model.named_parameters() if not n.endswith("k_proj.bias")
        }  # shifts all scores alike
        assert_gradient_reaches(model(x()), weights)

    @pytest.mark.parametrize("config", [CAUSAL, LLAMA], ids=["gpt", "llama"])
    def test_causal(self, config):
        assert_causal(Transformer(config), x())

    @pytest.mark.parametrize("config", [SMALL, BERT, CAUSAL, LLAMA], ids=["small", "bert", "gpt", "llama"])
    def test_padding_and_batch(self, config):
        model = Transformer(config)
        assert_padding_invariant(lambda x, mask: model(x, mask=mask), x(), MASK)
        assert_batch_independent(lambda x, mask: model(x, mask=mask), x(), MASK)

    def test_without_positions_it_sees_a_set_and_with_rotary_a_sequence(self):
        assert_permutation_equivariant(Transformer(SMALL), x())
        with pytest.raises(AssertionError):
            assert_permutation_equivariant(Transformer(replace(SMALL, rope_theta=1e4)), x())

    def test_rotary_sees_distances_only(self):
        model, h = Transformer(replace(SMALL, rope_theta=1e4)), x()
        padded = torch.cat([torch.randn(B, 3, D), h], dim=1)  # three positions later, with what is in front masked
        mask = torch.cat([torch.zeros(B, 3, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)], dim=1)
        assert_same(model(padded, mask=mask)[:, 3:], model(h))

    def test_layer_says_how_far_to_run(self):
        model, h = Transformer(replace(SMALL, depth=3)), x()
        states = [h]
        for block in model.blocks:
            states.append(block(states[-1]))
        for layer in (0, 1, 2, 3, -1, -2, -3, -4):
            assert torch.equal(model(h, layer=layer), states[layer])
        for layer in (4, -5):
            with pytest.raises(ValueError, match=f"layer {layer} does not exist: a stack of 3 blocks"):
                model(h, layer=layer)

    def test_autocast_casts_once_and_gives_bf16_products(self):
        """What q, k and v read is cast for all three, and the cache has the dtype of what they give."""
        model, h = Transformer(LLAMA), x()
        with torch.autocast("cpu", torch.bfloat16):
            cache = model.new_cache(B, T)
            y = model(h, cache=cache)
        assert cache.keys.dtype == torch.bfloat16 and y.dtype == torch.float32
        assert 0 < (y - model(h)).abs().max() < 0.1

    def test_cross_attention_in_every_nth_block(self):
        model = Transformer(replace(READER, depth=5, cross_attention_every=2))
        assert [block.cross_attention is not None for block in model.blocks] == [True, False, True, False, True]

    def test_a_context_is_read_and_its_padding_is_not(self):
        model, h, context = Transformer(READER), torch.randn(1, T, D), torch.randn(B, 5, 6)
        context_mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
        assert_padding_invariant(
            lambda c, m: model(h.expand(len(c), -1, -1), c, context_mask=m), context, context_mask, pooled=True
        )
        assert_gradient_reaches(model(h, context.requires_grad_()[:1]), [context])


class TestCachedTransformer:
    @pytest.mark.parametrize("config", [CAUSAL, LLAMA, replace(CAUSAL, rope_theta=1e4)], ids=["gpt", "llama", "rope"])
    def test_cached_is_full(self, config):
        model = Transformer(config).eval()
        assert_cache_equals_full(model, x(), lambda: model.new_cache(B, T), prompt_lengths=[2, 4, 1])

    @pytest.mark.parametrize("backend", ["reference", "fused"])
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("positions", [{}, {"rope_theta": 1e4}, {"alibi": True}, {"relative_buckets": 4}], ids=str)
    def test_cached_is_full_by_the_formula_and_fused(self, backend, kv_heads, positions):
        """Pieces of one token and of several, with biases of all kinds and shared heads, against the formula in one go."""
        model, h = Transformer(replace(CAUSAL, kv_heads=kv_heads, **positions)).eval(), x()
        set_attention_backend(model, "reference")
        full, cache, pieces = model(h), model.new_cache(B, T), []
        set_attention_backend(model, backend)
        assert_same(model(h), full)
        with torch.no_grad():
            for piece in h.split([3, 1, 2, 1], dim=1):
                pieces.append(model(piece, cache=cache))
        assert_same(torch.cat(pieces, dim=1), full)

    def test_a_larger_cache_gives_the_same(self):
        model = Transformer(LLAMA).eval()
        assert_cache_equals_full(model, x(), lambda: model.new_cache(B, T + 5), prompt_lengths=[3, 3, 3])

    def test_pieces_with_padding_in_the_middle_of_a_conversation(self):
        """Turn by turn: each piece is padded to the longest row, and the next one begins behind the real tokens."""
        model, h, other = Transformer(LLAMA).eval(), torch.randn(2, 6, D), torch.randn(2, 6, D)
        full, cache = model(h), model.new_cache(2, 8)
        turns = [([0, 0], [3, 1]), ([3, 1], [1, 3]), ([4, 4], [2, 2])]  # where each row starts, how much it says
        with torch.no_grad():
            for starts, counts in turns:
                T = max(counts)
                piece = other[:, :T].clone()
                for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
                    piece[i, :count] = h[i, start : start + count]
                mask = torch.arange(T) < torch.tensor(counts)[:, None]
                y = model(piece, cache=cache, mask=mask)
                expected = [full[i, s : s + n] for i, (s, n) in enumerate(zip(starts, counts, strict=True))]
                assert_same(y[mask], torch.cat(expected))

    def test_has_the_dtype_of_the_weights_and_the_width_of_the_keys(self):
        model = Transformer(replace(LLAMA, head_width=6)).bfloat16()
        cache = model.new_cache(B, T)
        assert cache.keys.shape == cache.values.shape == (2, B, 2, T, 6)
        assert cache.keys.dtype == torch.bfloat16 and cache.capacity == T


class TestRead:
    """One token a row: the last block computes its query alone."""

    @pytest.mark.parametrize(
        "mask", [None, MASK, MASK & (torch.arange(T) != 1)], ids=["whole", "padded", "with a hole"]
    )
    @pytest.mark.parametrize(
        "config",
        [SMALL, CAUSAL, BERT, LLAMA, replace(SMALL, kv_heads=2, norm="rmsnorm"), replace(CAUSAL, depth=1)],
        ids=["small", "gpt", "bert", "llama", "grouped", "one block"],
    )
    def test_is_the_state_of_the_full_forward_in_value_and_gradient(self, config, mask):
        model, at = Transformer(config).double(), torch.tensor([6, 0, 3])
        rows = torch.arange(B)
        assert_same_gradients(
            lambda x: model.state_at(x, at, mask=mask), lambda x: model(x, mask=mask)[rows, at], [x().double()], model
        )

    def test_a_context_is_not_asked_for(self):
        model, h = Transformer(READER), x()
        assert_same(model.state_at(h, torch.tensor([6, 1, 3])), model(h)[torch.arange(B), torch.tensor([6, 1, 3])])


def test_a_context_is_remembered_once_for_all_blocks():
    config = TransformerConfig(width=8, depth=4, heads=2, cross_attention_every=2, context_width=6)
    stack, x, context = Transformer(config), torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    remembered = stack.context_keys_values(context)
    assert [entry is None for entry in remembered] == [False, True, False, True]
    assert torch.equal(stack(x, remembered), stack(x, context))


class TestRelativePositions:
    @staticmethod
    def bucket(distance, buckets, farthest, both_sides):
        """As the paper tells it: one bucket each for the near half, then logarithmically wider ones; the last for the rest."""
        start = 0
        if both_sides:
            buckets //= 2
            start = buckets if distance > 0 else 0
            distance = abs(distance)
        else:
            distance = max(0, -distance)
        near = buckets // 2
        if distance < near:
            return start + distance
        return start + min(
            buckets - 1, near + int(math.log(distance / near) / math.log(farthest / near) * (buckets - near))
        )

    @pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (6, 9)])
    @pytest.mark.parametrize("both_sides", [False, True])
    def test_buckets(self, buckets, farthest, both_sides):
        distances = torch.arange(-150, 151)
        found = relative_bucket(distances, buckets, farthest, both_sides=both_sides).tolist()
        assert found == [self.bucket(d, buckets, farthest, both_sides) for d in distances.tolist()]

    def test_the_bias_depends_on_the_distance_alone(self):
        config = TransformerConfig(width=8, depth=1, heads=2, causal=True, relative_buckets=8, relative_distance=20)
        relative = Transformer(config).relative
        bias = relative(torch.arange(6), 6)
        assert_same(bias[..., 3:, 2:5], bias[..., 2:5, 1:4])
        assert_same(relative(torch.tensor([[4], [2]]), 6), torch.stack([bias[0, :, 4:5], bias[0, :, 2:3]]))

    def test_step_by_step_is_the_whole(self):
        config = TransformerConfig(
            width=8, depth=2, heads=2, causal=True, relative_buckets=8, relative_distance=20, attention_scale=1.0
        )
        stack, x = Transformer(config).eval(), torch.randn(2, 7, 8)
        with torch.no_grad():
            cache = stack.new_cache(2, 7)
            steps = [stack(part, cache=cache) for part in x.split([3, 1, 1, 2], dim=1)]
            assert_same(torch.cat(steps, dim=1), stack(x))

    def test_one_table_is_added_to_the_scores_of_every_block(self):
        stack, h = Transformer(replace(SMALL, relative_buckets=8, relative_distance=6)), x()
        bias = torch.empty(1, SMALL.heads, T, T)
        for t in range(T):
            for s in range(T):
                bias[0, :, t, s] = stack.relative.table.weight[self.bucket(s - t, 8, 6, True)]
        y = h
        for block in stack.blocks:
            y = block(y, bias=bias, mask=MASK)
        assert_same(stack(h, mask=MASK), y)

    def test_step_by_step_in_rows_of_different_lengths(self):
        stack = Transformer(replace(CAUSAL, relative_buckets=8, relative_distance=6)).eval()
        assert_cache_equals_full(stack, x(), lambda: stack.new_cache(B, T), prompt_lengths=[2, 4, 1])
