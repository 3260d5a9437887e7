import torch

from minivlm.layers import TransformerConfig
from minivlm.layers.co_attention import CoAttention
from minivlm.testing import assert_same

WORDS = TransformerConfig(width=12, depth=1, heads=2, norm_place="post")
REGIONS = TransformerConfig(width=8, depth=1, heads=2, norm_place="post")


def make():
    return CoAttention(WORDS, REGIONS, heads=3, head_width=4).eval(), torch.randn(2, 5, 12), torch.randn(2, 3, 8)


def test_each_stream_asks_the_other_as_it_was_before():
    model, words, regions = make()
    heard, seen = model(words, regions)
    for listener, x, other, y in ((model.words, words, regions, heard), (model.regions, regions, words, seen)):
        h = listener.attention_norm(x + listener.attention(x, other))
        assert_same(y, listener.mlp_norm(h + listener.mlp(h)))


def test_padding_of_the_other_stream_is_not_heard():
    model, words, regions = make()
    mask, region_mask = torch.arange(5) < torch.tensor([[5], [3]]), torch.arange(3) < torch.tensor([[2], [3]])
    heard, seen = model(words, regions, mask, region_mask)
    other_words, other_regions = words.clone(), regions.clone()
    other_words[1, 3:], other_regions[0, 2:] = 9.0, 9.0
    again, seen_again = model(other_words, other_regions, mask, region_mask)
    assert_same(again[mask], heard[mask])
    assert_same(seen_again[region_mask], seen[region_mask])
    assert not torch.allclose(model(other_words, other_regions)[0][0], heard[0])
