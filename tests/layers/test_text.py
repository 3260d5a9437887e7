from dataclasses import replace

import pytest
import torch

from minivlm.layers import TextConfig, TextTransformer
from minivlm.testing import (
    assert_batch_independent,
    assert_causal,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_same,
)

END, PAD = 29, 0
SMALL = TextConfig(width=16, depth=2, heads=4, vocab_size=30, context=10, end_token=END)
LENGTHS = [8, 3, 5]
MASK = torch.arange(8) < torch.tensor(LENGTHS)[:, None]


def tokens():
    """(3, 8): words, an end token, padding."""
    ids = torch.randint(1, END, (3, 8)).masked_fill(~MASK, PAD)
    ids[torch.arange(3), torch.tensor(LENGTHS) - 1] = END
    return ids


def build(**options) -> TextTransformer:
    return TextTransformer(replace(SMALL, **options))


class TestPool:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(
        ("pool", "positions"), [("end", [7, 2, 4]), ("argmax", [7, 2, 4]), ("first", [0, 0, 0]), ("last", [7, 7, 7])]
    )
    def test_reads_the_token_that_speaks_for_the_text(self, pool, positions, causal):
        text, ids = build(pool=pool, causal=causal), tokens()
        assert text.pooled_position(ids).tolist() == positions
        assert_same(text(ids, MASK), text.features(ids, MASK)[torch.arange(3), torch.tensor(positions)])

    def test_without_an_end_token_the_last_real_token_is_pooled(self):
        text, ids = build(end_token=None), torch.randint(3, 30, (3, 8))
        mask = torch.arange(8) < torch.tensor([[8], [3], [5]])
        assert text.pooled_position(ids, mask).tolist() == [7, 2, 4]
        assert text.pooled_position(ids).tolist() == [7, 7, 7]
        ids[torch.arange(3), torch.tensor([7, 2, 4])] = END
        other = build()
        other.load_state_dict(text.state_dict())
        assert_same(text(ids, mask), other(ids, mask), tolerance=0)

    def test_the_first_of_several_end_tokens(self):
        ids = tokens()
        ids[1, 3:] = END  # published CLIP vocabularies pad with the end token
        assert build().pooled_position(ids).tolist() == [7, 2, 4]


class TestFeatures:
    def test_is_embedding_positions_blocks_norm(self):
        text, ids = build(causal=False), tokens()
        x = text.token_embedding.weight[ids] + text.position_embedding[:8]
        for block in text.transformer.blocks:
            x = block(x, mask=MASK)
        assert_same(text.features(ids, MASK), text.norm(x))

    def test_causal(self):
        assert_causal(build().features, tokens())
        with pytest.raises(AssertionError):
            assert_causal(build(causal=False).features, tokens())

    def test_order_matters(self):
        text, ids = build(causal=False), tokens()[:1]
        swapped = ids[:, [1, 0, *range(2, 8)]]
        assert not torch.allclose(text(ids), text(swapped))


class TestPadding:
    @pytest.mark.parametrize("causal", [True, False])
    def test_is_not_read(self, causal):
        text, ids = build(causal=causal), tokens()
        assert_padding_invariant(text.features, ids, MASK)
        assert_padding_invariant(text, ids, MASK, pooled=True)
        assert_batch_independent(text, ids, MASK)

    def test_a_causal_text_needs_no_mask(self):
        text, ids = build(), tokens()
        assert torch.equal(text(ids), text(ids, MASK))

    def test_a_bidirectional_one_does(self):
        text, ids = build(causal=False), tokens()
        assert not torch.allclose(text(ids)[1], text(ids, MASK)[1])

    def test_where_the_config_says_so_padding_is_read_like_words(self):
        text, ids = build(causal=False, use_mask=False, pool="last"), tokens()
        assert torch.equal(text(ids, MASK), text(ids))
        other = torch.where(MASK, ids, 5)
        assert not torch.allclose(text(other, MASK)[1:], text(ids, MASK)[1:])


@pytest.mark.parametrize("pool", ["end", "argmax", "first", "last"])
def test_gradients_reach_all(pool):
    text = build(pool=pool, causal=pool != "first")  # a causal first token sees itself alone
    weights = {n: p for n, p in text.named_parameters() if not n.endswith("k_proj.bias")}
    assert_gradient_reaches(text(tokens(), MASK), weights)


def test_shorter_than_the_context_uses_its_first_positions():
    text, ids = build(), tokens()[1:2, :3]
    text.position_embedding.data[3:] = torch.nan
    assert text(ids).isfinite().all()


def test_longer_than_the_context():
    with pytest.raises(ValueError, match="texts have 11 tokens, but the context is 10"):
        build()(torch.ones(1, 11, dtype=torch.long))
