import math
from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minivlm.layers import (
    MLP,
    Attention,
    Cache,
    CrossAttention,
    GatedCrossAttention,
    Rotary,
    attend,
    image_mask,
    set_attention_backend,
)
from minivlm.layers.attention import BACKENDS
from minivlm.layers.attention_kernels import attend_in_strips
from minivlm.layers.autocast import cast_once
from minivlm.testing import (
    assert_batch_independent,
    assert_causal,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_permutation_equivariant,
    assert_permutation_invariant,
    assert_same,
    assert_same_gradients,
)

B, T, S, K = 2, 5, 7, 4


def in_three_loops(q, k, v, mask=None, causal=False):
    """Attention as one would do it by hand: for every row, head and query, a softmax over the keys it may see."""
    y = torch.zeros_like(q)
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if mask is not None:
        mask = mask.expand(*q.shape[:3], S)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(T):
                seen = [s for s in range(S) if (mask is None or mask[b, h, t, s]) and (not causal or s <= t + S - T)]
                if not seen:
                    continue
                scores = torch.stack([(q[b, h, t] * k[b, h // group, s]).sum() / math.sqrt(K) for s in seen])
                y[b, h, t] = sum(w * v[b, h // group, s] for w, s in zip(scores.softmax(dim=0), seen, strict=True))
    return y


def masks(S: int, T: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    shut = torch.rand(B, 1, T, S, generator=generator) > 0.4
    shut[0, 0, -1] = False  # one query sees nothing
    return {
        "none": None,
        "keys": (torch.arange(S) < torch.tensor([[S], [S - 3]]))[:, None, None],  # the padding of each row
        "pairs": torch.rand(B, 1, T, S, generator=generator) > 0.3,
        "heads": torch.rand(B, 4, T, S, generator=generator) > 0.3,
        "one query shut": shut,
        "one row shut": (torch.arange(S) < torch.tensor([[S], [0]]))[:, None, None],
    }


def tensors(*, heads=4, kv_heads=4, queries=T, keys=S, dtype=torch.float64):
    shapes = (B, heads, queries, K), (B, kv_heads, keys, K), (B, kv_heads, keys, K)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


class TestAttend:
    @pytest.mark.parametrize("backend", BACKENDS[1:])
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("mask", masks(S, T))
    def test_is_the_sum_done_by_hand(self, backend, kv_heads, causal, mask):
        q, k, v = tensors(kv_heads=kv_heads)
        mask = masks(S, T)[mask]
        y = attend(q, k, v, mask=mask, causal=causal, backend=backend)
        assert_same(y, in_three_loops(q, k, v, mask, causal))

    def test_a_model_can_be_told_to_use_the_formula(self):
        images, x = torch.randn(B, S, 16), torch.randn(B, T, 16)
        gated = GatedCrossAttention(16, 4).eval()
        torch.nn.init.ones_(gated.attention_gate)
        visible = image_mask(torch.tensor([[0, 9, 0, 0, 9], [0, 0, 0, 0, 9]]), 9, 2, latents=4)[..., :S]
        with torch.no_grad():
            plain = gated(x, images, visible)
            set_attention_backend(gated, "reference")
            assert gated.attention.backend == "reference"
            assert_same(gated(x, images, visible), plain)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    @pytest.mark.parametrize(("queries", "keys"), [(T, T), (3, S), (1, S), (S, 3)])
    @pytest.mark.parametrize("causal", [False, True])
    def test_fused_is_the_reference_in_value_and_gradient(self, dtype, kv_heads, queries, keys, causal):
        inputs = tensors(kv_heads=kv_heads, queries=queries, keys=keys, dtype=dtype)
        for mask in masks(keys, queries).values():
            reference, fused = (
                partial(attend, mask=mask, causal=causal, backend=backend) for backend in ("reference", "fused")
            )
            assert_same_gradients(reference, fused, inputs)

    @pytest.mark.parametrize("biased", ["no bias", "one of all rows", "one of every row"])
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize(("queries", "keys"), [(T, T), (3, S), (1, S), (S, 3), (S, 1), (1, 1)])
    def test_fused_is_the_reference_whatever_is_given(self, biased, kv_heads, queries, keys):
        """Every mask, bias, scale, causal or not, more queries than keys or fewer, heads that share keys or not."""
        inputs = tensors(kv_heads=kv_heads, queries=queries, keys=keys)
        rows = {"no bias": (), "one of all rows": (1,), "one of every row": (B,)}[biased]
        inputs += [torch.randn(*rows, 4, queries, keys, dtype=torch.float64)] if rows else []
        for mask, causal, scale in product(masks(keys, queries).values(), (False, True), (None, 0.3)):

            def run(q, k, v, bias=None, *, backend, mask=mask, causal=causal, scale=scale):
                return attend(q, k, v, mask=mask, bias=bias, causal=causal, scale=scale, backend=backend)

            assert_same_gradients(partial(run, backend="reference"), partial(run, backend="fused"), inputs)

    @pytest.mark.parametrize("backend", ["reference", "fused"])
    @pytest.mark.parametrize("mask", ["one query shut", "one row shut"])
    def test_a_query_that_may_see_nothing_gets_zeros_and_harms_no_gradient(self, backend, mask):
        mask = masks(S, T)[mask]
        inputs = [x.requires_grad_() for x in tensors(dtype=torch.float32)]
        y = attend(*inputs, mask=mask, backend=backend)
        shut = ~mask.expand(B, 4, T, S).any(dim=-1)
        assert shut.any() and not y[shut].any() and (y[~shut] != 0).all()
        for grad in torch.autograd.grad(y.sum(), inputs):
            assert grad.isfinite().all()

    @pytest.mark.parametrize("backend", BACKENDS[1:])
    def test_more_queries_than_keys(self, backend):
        q, k, v = tensors(queries=S, keys=3)
        y = attend(q, k, v, causal=True, backend=backend)
        assert not y[:, :, :4].any()  # the last query sees the last key, so the first four see none
        assert_same(y, in_three_loops(q, k, v, causal=True))

    @pytest.mark.parametrize(("queries", "keys", "height"), [(T, T, 2), (T, S, 2), (S, S, 3), (T, S, 1), (T, T, 9)])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_strips_are_the_whole_in_value_and_gradient(self, queries, keys, height, kv_heads):
        inputs = tensors(kv_heads=kv_heads, queries=queries, keys=keys)
        reference = partial(attend, causal=True, backend="reference")
        assert_same_gradients(reference, partial(attend_in_strips, height=height), inputs)

    def test_a_query_that_may_see_nothing_among_more_queries_than_keys_in_bf16(self):
        q, k, v = tensors(queries=S, keys=3, dtype=torch.bfloat16)
        assert not attend(q, k, v, causal=True)[:, :, :4].any()

    def test_the_mean_where_all_keys_are_alike(self):
        q, _, v = tensors()
        k = torch.ones_like(v)
        assert_same(attend(q, k, v), v.mean(dim=2, keepdim=True).expand_as(q))

    @pytest.mark.parametrize("backend", ["reference", "fused"])
    def test_dropout_drops_weights_and_keeps_the_mean(self, backend):
        q, k, v = torch.randn(50, 4, 100, K), torch.randn(50, 4, S, K), torch.ones(50, 4, S, K)
        y = attend(q, k, v, dropout=0.5, backend=backend)  # without dropout every value were 1
        assert y.std() > 0.3
        assert y.mean().item() == pytest.approx(1.0, abs=0.03)

    def test_automatic_choice(self):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = tensors(dtype=dtype)
            backend = "reference" if dtype == torch.bfloat16 else "fused"  # what is faster on a CPU
            assert torch.equal(attend(q, k, v), attend(q, k, v, backend=backend))


class TestAttention:
    def test_is_its_formula(self):
        attention = Attention(16, 4, kv_heads=2)
        x = torch.randn(B, T, 16)
        q = attention.q_proj(x).view(B, T, 4, K).transpose(1, 2)
        k, v = (p(x).view(B, T, 2, K).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
        y = in_three_loops(q, k, v).transpose(1, 2).reshape(B, T, 16)
        assert_same(attention(x), attention.out_proj(y))

    def test_a_head_may_be_wider_than_its_share(self):
        attention = Attention(10, 3, head_width=K, kv_heads=1, bias=False)
        assert [tuple(p.shape) for p in attention.parameters()] == [(12, 10), (4, 10), (4, 10), (10, 12), (10,)]
        x = torch.randn(B, T, 10)
        q = attention.q_proj(x).view(B, T, 3, K).transpose(1, 2)
        k, v = attention.k_proj(x)[:, None], attention.v_proj(x)[:, None]
        assert_same(attention(x), attention.out_proj(in_three_loops(q, k, v).transpose(1, 2).reshape(B, T, 12)))

    def test_grouped_heads_are_full_heads_with_repeated_weights(self):
        grouped, full = Attention(16, 4, kv_heads=2), Attention(16, 4)
        state = grouped.state_dict()
        for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            state[name] = state[name].unflatten(0, (2, K)).repeat_interleave(2, dim=0).flatten(0, 1)
        full.load_state_dict(state)
        x = torch.randn(B, T, 16)
        assert_same(full(x), grouped(x))

    def test_every_backend_gives_the_same(self):
        attention = Attention(16, 4, causal=True).double()
        x, mask = torch.randn(B, T, 16).double(), torch.arange(T) < torch.tensor([[T], [2]])

        def run(backend):
            def f(x):
                set_attention_backend(attention, backend)
                return attention(x, mask=mask)

            return f

        assert_same_gradients(run("reference"), run("fused"), [x], attention)
        assert_same_gradients(run("reference"), run("auto"), [x], attention)

    def test_gradients_reach_all(self):
        attention = Attention(16, 4, kv_heads=2)
        weights = {n: p for n, p in attention.named_parameters() if n != "k_proj.bias"}  # shifts all scores alike
        assert_gradient_reaches(attention(torch.randn(B, T, 16)), weights)

    def test_without_positions_it_sees_a_set(self):
        attention = Attention(16, 4)
        x, context = torch.randn(B, T, 16), torch.randn(B, S, 16)
        assert_permutation_equivariant(attention, x)
        assert_permutation_invariant(lambda c: attention(x, c), context)
        assert_batch_independent(attention, x, context)

    def test_causal(self):
        assert_causal(Attention(16, 4, causal=True), torch.randn(B, T, 16))
        with pytest.raises(AssertionError):
            assert_causal(Attention(16, 4), torch.randn(B, T, 16))

    @pytest.mark.parametrize("causal", [False, True])
    def test_padding(self, causal):
        attention = Attention(16, 4, causal=causal)
        mask = torch.arange(T) < torch.tensor([[T], [2]])
        assert_padding_invariant(lambda x, mask: attention(x, mask=mask), torch.randn(B, T, 16), mask)

    def test_masks_of_two_three_and_four_dimensions_are_one(self):
        attention = Attention(16, 4)
        x, keys = torch.randn(B, T, 16), torch.arange(T) < torch.tensor([[T], [2]])
        pairs = keys[:, None].expand(B, T, T)
        assert torch.equal(attention(x, mask=keys), attention(x, mask=pairs))
        assert torch.equal(attention(x, mask=keys), attention(x, mask=pairs[:, None]))

    def test_pairs_mask_each_query(self):
        attention, x = Attention(16, 4), torch.randn(B, T, 16)
        only_itself = torch.eye(T, dtype=torch.bool).expand(B, T, T)
        assert_same(attention(x, mask=only_itself), attention.out_proj(attention.v_proj(x)))

    def test_a_mask_of_numbers_is_refused(self):
        with pytest.raises(TypeError, match=r"boolean .* not torch.float32"):
            Attention(16, 4)(torch.randn(B, T, 16), mask=torch.ones(B, T))

    def test_dropout_in_training_only(self):
        attention, x = Attention(16, 4, dropout=0.5), torch.randn(B, T, 16)
        assert not torch.equal(attention(x), attention(x))
        attention.eval()
        assert torch.equal(attention(x), attention(x))

    def test_rotary_positions_enter_queries_and_keys_but_not_values(self):
        attention, x = Attention(16, 4), torch.randn(B, T, 16)
        rope = Rotary.at(torch.arange(T), K)
        q, k, v = (attention.split(p(x), 4) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        y = in_three_loops(rope(q), rope(k), v).transpose(1, 2).flatten(2)
        assert_same(attention(x, rope=rope), attention.out_proj(y))

    def test_cache(self):
        attention, x = Attention(16, 4, kv_heads=2, causal=True), torch.randn(B, T, 16)
        cache = Cache(1, B, 2, T, K)
        with torch.no_grad():
            for piece in x.split([2, 3], dim=1):
                cache.begin(piece.shape[1])
                y = attention(piece, cache=cache.layer(0))
                cache.advance(None, piece.shape[1])
        assert_same(y, attention(x)[:, 2:])

    def test_sizes_that_cannot_be(self):
        with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
            Attention(10, 4)
        with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
            Attention(16, 4, kv_heads=3)

    def test_an_unknown_backend(self):
        with pytest.raises(ValueError, match="'flash'; there are auto, reference, fused"):
            set_attention_backend(Attention(16, 4), "flash")


class TestAutocast:
    """What several products read is copied once, whoever calls: q, k and v of x, or k and v of a context."""

    @pytest.mark.parametrize(
        ("layer", "given"),
        [
            (Attention(16, 4), [(B, T, 16)]),
            (CrossAttention(16, 4, context_width=6), [(B, T, 16), (B, S, 6)]),
            (MLP(16, 32, "silu", gated=True), [(B, T, 16)]),
        ],
        ids=["attention", "cross-attention", "gated MLP"],
    )
    def test_copies_once(self, layer, given):
        inputs, copied = [torch.randn(shape) for shape in given], Counter()

        class Copies(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is torch.ops.aten._to_copy.default:
                    copied.update(i for i, x in enumerate(inputs) if args[0].data_ptr() == x.data_ptr())
                return function(*args, **(kwargs or {}))

        with Copies(), torch.autocast("cpu", torch.bfloat16):
            y = layer(*inputs)
        assert y.dtype == torch.bfloat16 and copied == dict.fromkeys(range(len(inputs)), 1)
        assert 0 < (y - layer(*inputs)).abs().max() < 0.05

    def test_leaves_double_precision_alone(self):
        layer, x = Attention(16, 4).double(), torch.randn(B, T, 16).double()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.q_proj(cast_once(x)), layer.q_proj(x)) and cast_once(x) is x


class TestCrossAttention:
    def test_sizes_by_other_names_and_a_mask_by_position(self):
        cross, mask = CrossAttention(d_model=16, num_heads=4), torch.tensor([[True] * 3 + [False] * (S - 3)] * B)
        assert cross.heads == 4 and cross.out_proj.out_features == 16
        x, context = torch.randn(B, T, 16), torch.randn(B, S, 16)
        assert_same(cross(x, context, mask), cross(x, context[:, :3]))
        with pytest.raises(TypeError, match=r"boolean .* not torch.float32: write mask == 1 if 1 means that"):
            cross(x, context, mask.float())

    def test_is_attention_with_a_context_of_another_width(self):
        cross = CrossAttention(16, 4, context_width=6)
        x, context = torch.randn(B, T, 16), torch.randn(B, S, 6)
        mask = torch.arange(S) < torch.tensor([[S], [3]])
        q = cross.split(cross.q_proj(x), 4)
        k, v = (cross.split(p(context), 4) for p in (cross.k_proj, cross.v_proj))
        y = in_three_loops(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2)
        assert_same(cross(x, context, mask=mask), cross.out_proj(y))

    def test_needs_a_context(self):
        with pytest.raises(TypeError):
            CrossAttention(16, 4)(torch.randn(B, T, 16))

    def test_what_it_may_not_read_does_not_matter(self):
        cross, x = CrossAttention(16, 4), torch.randn(1, T, 16)  # every context is asked the same
        mask = torch.arange(S) < torch.tensor([[S], [3]])
        assert_padding_invariant(
            lambda context, mask: cross(x.expand(len(context), -1, -1), context, mask=mask),
            torch.randn(B, S, 16),
            mask,
            pooled=True,
        )


class TestBiasAndScale:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("mask", masks(S, S))
    def test_by_hand(self, causal, mask):
        """softmax(scale · q kᵀ + bias), and both backends agree in value and gradient."""
        q, k, v = tensors(queries=S, keys=S)
        bias, mask = torch.randn(1, 4, S, S, dtype=torch.float64), masks(S, S)[mask]
        scores = 0.3 * q @ k.transpose(2, 3) + bias
        allowed = torch.ones(S, S, dtype=torch.bool).tril() if causal else torch.ones(S, S, dtype=torch.bool)
        allowed = allowed if mask is None else allowed & mask
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
        options = dict(mask=mask, causal=causal, scale=0.3)
        for backend in BACKENDS:
            assert_same(attend(q, k, v, bias=bias, backend=backend, **options), weights @ v)
        run = lambda backend: lambda q, k, v, bias: attend(q, k, v, bias=bias, backend=backend, **options)
        assert_same_gradients(run("reference"), run("fused"), [q, k, v, bias])

    def test_a_function_may_be_the_backend(self):
        q, k, v = tensors()
        given = {}

        def backend(q, k, v, **options):
            given.update(options)
            return v.mean(dim=2, keepdim=True).expand_as(q)

        assert_same(attend(q, k, v, scale=2.0, backend=backend), v.mean(dim=2, keepdim=True).expand_as(q))
        assert given == dict(mask=None, causal=False, bias=None, scale=2.0, dropout=0.0)


def test_a_context_may_be_given_as_what_was_remembered_of_it():
    attention, x, context = CrossAttention(8, heads=2, context_width=6), torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    assert torch.equal(attention(x, attention.keys_values(context), mask=mask), attention(x, context, mask=mask))
