import pytest
import torch

from minivlm import checkpoint
from minivlm.layers import BERT, BERTConfig
from minivlm.testing import assert_padding_invariant, assert_same

CONFIG = BERTConfig(vocab_size=40, context=10, width=24, depth=2, heads=2)
TOKENS = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]])
MASK = TOKENS != 0


def test_embeddings_are_words_and_positions_and_types():
    model = BERT(CONFIG).eval()
    types = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    words, places = model.token_embedding.weight[TOKENS], model.position_embedding.weight[:5]
    expected = model.norm(words + places + model.type_embedding.weight[types])
    assert_same(model.embed(TOKENS, types), expected)
    assert_same(model(TOKENS, MASK).hidden, model(TOKENS, MASK, torch.zeros_like(TOKENS)).hidden)
    assert not torch.allclose(model(TOKENS, MASK).hidden, model(TOKENS, MASK, types).hidden)


def test_every_block_ends_in_its_norm():
    hidden = BERT(CONFIG).eval()(TOKENS).hidden
    assert_same(hidden.mean(dim=-1), torch.zeros(2, 5), tolerance=1e-3)
    assert_same(hidden.var(dim=-1, unbiased=False), torch.ones(2, 5))


def test_padding_is_not_seen():
    model = BERT(CONFIG).eval()
    assert_padding_invariant(lambda tokens, mask: model(tokens, mask).hidden, TOKENS, MASK)


def test_every_token_sees_what_follows():
    model = BERT(CONFIG).eval()
    other = TOKENS.clone()
    other[0, 4] = 9
    assert ((model(other).hidden - model(TOKENS).hidden)[0].abs().amax(dim=-1) > 1e-4).all()


def test_a_text_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="texts have 11 tokens, but the context is 10; cut them first"):
        BERT(CONFIG)(torch.ones(1, 11, dtype=torch.long))


def test_comes_back_from_a_directory(tmp_path):
    model = BERT(BERTConfig(vocab_size=40, context=10, token_types=0, width=24, depth=1, heads=2)).eval()
    model.save_pretrained(tmp_path)
    back, _ = checkpoint.load(tmp_path)
    assert back.config == model.config
    assert_same(back(TOKENS, MASK).hidden, model(TOKENS, MASK).hidden, tolerance=0)
