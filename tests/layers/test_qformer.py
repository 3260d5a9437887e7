from dataclasses import replace

import pytest
import torch

from minivlm.layers import BERT, BERTConfig, QFormer, QFormerConfig
from minivlm.layers.qformer import attention_mask
from minivlm.testing import assert_causal, assert_gradient_reaches, assert_padding_invariant, assert_same

CONFIG = QFormerConfig(width=24, depth=3, heads=2, queries=3, vocab_size=40, context=12, context_width=20)
TOKENS = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]])
MASK = TOKENS != 0


@pytest.fixture
def model():
    model = QFormer(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def features(n=2):
    return torch.randn(n, 6, 20)


def drawn(text):
    return torch.tensor([[c == "■" for c in line.split()] for line in text.strip().splitlines()])


FIGURES = {
    "bidirectional": "■ ■ ■ ■ ■\n ■ ■ ■ ■ ■\n ■ ■ ■ ■ ■\n ■ ■ ■ ■ ■\n ■ ■ ■ ■ ■",
    "unimodal": "■ ■ · · ·\n ■ ■ · · ·\n · · ■ ■ ■\n · · ■ ■ ■\n · · ■ ■ ■",
    "causal": "■ ■ · · ·\n ■ ■ · · ·\n ■ ■ ■ · ·\n ■ ■ ■ ■ ·\n ■ ■ ■ ■ ■",
}


class TestWhoSeesWhom:
    """Two queries and three words, entry by entry, as in the paper's figure."""

    @pytest.mark.parametrize("see", FIGURES)
    def test_is_what_the_figure_shows(self, see):
        mask = attention_mask(see, 2, torch.tensor([[True, True, True], [True, False, True]]))
        assert torch.equal(mask[0], drawn(FIGURES[see]))
        without = drawn(FIGURES[see])
        without[:, 3] = False  # padding is seen by no one
        assert torch.equal(mask[1], without)

    @pytest.mark.parametrize(("see", "heard"), [("bidirectional", True), ("unimodal", False), ("causal", False)])
    def test_queries_hear_the_text_for_matching_alone(self, model, see, heard):
        seen, other = features(), TOKENS.clone()
        other[:, 1] = 20
        a, b = (model(seen, tokens, MASK, attention=see) for tokens in (TOKENS, other))
        assert torch.allclose(a.queries, b.queries) is not heard
        if not heard:
            assert_same(a.queries, model(seen).queries)

    @pytest.mark.parametrize(("see", "told"), [("bidirectional", True), ("unimodal", False), ("causal", True)])
    def test_the_text_knows_of_the_picture_but_for_contrast(self, model, see, told):
        a, b = (model(features(), TOKENS, MASK, attention=see) for _ in range(2))
        assert torch.allclose(a.text, b.text) is not told
        if not told:
            assert_same(a.text[MASK], model(None, TOKENS, MASK, attention=see).text[MASK])

    def test_words_do_not_see_the_future_when_they_are_told(self, model):
        seen = features()
        assert_causal(lambda tokens: model(seen, tokens, attention="causal").text, TOKENS)

    def test_another_word_is_refused(self, model):
        with pytest.raises(ValueError, match="attention is 'both'; there are bidirectional, unimodal and causal"):
            model(features(), TOKENS, attention="both")


@pytest.mark.parametrize("see", ["bidirectional", "unimodal", "causal"])
def test_padding_changes_nothing(model, see):
    seen = features(1)

    def f(tokens, mask):
        return model(seen.expand(len(tokens), -1, -1), tokens, mask, attention=see).text

    assert_padding_invariant(f, TOKENS, MASK)


class TestAfterQueries:
    def test_telling_is_the_whole_under_the_causal_mask(self, model):
        seen = features()
        whole, looked = model(seen, TOKENS, MASK, attention="causal"), model.query(seen)
        assert_same(looked.queries, whole.queries)
        assert_same(model.continue_text(TOKENS, MASK, after=looked).text, whole.text)

    def test_so_are_the_gradients(self, model):
        seen = features()
        w = torch.randn(2, 5, 24)
        losses = (
            model(seen, TOKENS, MASK, attention="causal").text,
            model.continue_text(TOKENS, MASK, after=model.query(seen)).text,
        )
        grads = [torch.autograd.grad((y * w).sum(), [*model.parameters()], materialize_grads=True) for y in losses]
        for name, a, b in zip(dict(model.named_parameters()), *grads, strict=True):
            if "k_proj.bias" not in name:
                assert_same(a, b, name, tolerance=1e-4)

    def test_word_by_word_is_all_at_once(self, model):
        at_once = model.continue_text(TOKENS, after=(told := model.query(features()))).text
        for t in range(5):
            told = model.continue_text(TOKENS[:, t : t + 1], after=told)
            assert_same(told.text[:, 0], at_once[:, t])


def test_queries_read_pictures_in_every_second_block_and_texts_have_their_own_mlp(model):
    assert [block.cross_attention is not None for block in model.blocks] == [True, False, True]
    assert model.blocks[0].cross_attention.k_proj.in_features == 20
    text, queries = model(None, TOKENS).text, model(features()).queries
    with torch.no_grad():
        model.blocks[-1].query_mlp.down_proj.weight.zero_()
    assert_same(model(None, TOKENS).text, text, tolerance=0)
    assert not torch.allclose(model(features()).queries, queries)


def test_gradients_reach_all_that_takes_part(model):
    out = model(features(), TOKENS, MASK)
    last = {"blocks.2.mlp.", "blocks.2.mlp_norm."}
    weights = {n: p for n, p in model.named_parameters() if "k_proj.bias" not in n and not n.startswith(tuple(last))}
    assert_gradient_reaches((out.queries * torch.randn_like(out.queries)).sum(), weights)


class TestFromBERT:
    BERT_CONFIG = BERTConfig(vocab_size=38, context=16, width=24, depth=3, heads=2)

    def test_text_alone_is_read_as_bert_reads_it(self, model):
        bert = BERT(self.BERT_CONFIG, seed=3).eval()
        model.load_bert(bert)
        assert_same(model(None, TOKENS, MASK).text[MASK], bert(TOKENS, MASK).hidden[MASK])

    def test_queries_have_its_mlps_and_the_rest_stays_new(self, model):
        before = {name: p.clone() for name, p in model.named_parameters()}
        bert = BERT(self.BERT_CONFIG, seed=3)
        model.load_bert(bert)
        for block, source in zip(model.blocks, bert.transformer.blocks, strict=True):
            assert_same(block.query_mlp.up_proj.weight, source.mlp.up_proj.weight, tolerance=0)
        same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
        assert same == {"queries"} | {name for name in before if "cross_attention" in name}
        assert_same(model.token_embedding.weight[38:], before["token_embedding.weight"][38:], tolerance=0)

    def test_a_q_former_without_text_takes_what_it_has(self):
        blind = QFormer(replace(CONFIG, vocab_size=None))
        blind.load_bert(bert := BERT(self.BERT_CONFIG))
        assert_same(blind.blocks[1].attention.q_proj.weight, bert.transformer.blocks[1].attention.q_proj.weight)
        with pytest.raises(ValueError, match="this Q-Former has no text side: its config has no vocab_size"):
            blind(None, TOKENS)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"depth": 2}, "depth of the Q-Former is 3, but BERT's is 2"),
            ({"context": 8}, "BERT has only 8 positions"),
            ({"vocab_size": 41}, "a vocabulary of 40, but BERT has"),
        ],
        ids=str,
    )
    def test_another_size_is_refused(self, model, change, message):
        with pytest.raises(ValueError, match=message):
            model.load_bert(BERT(replace(self.BERT_CONFIG, **change)))


def test_a_text_beyond_the_context_is_refused(model):
    with pytest.raises(ValueError, match="texts have 13 tokens, but the context of the Q-Former is 12; cut them first"):
        model(None, torch.ones(1, 13, dtype=torch.long))


def test_queries_must_see():
    with pytest.raises(ValueError, match="cross_attention_every must be at least 1"):
        replace(CONFIG, cross_attention_every=0)


def test_the_seed_alone_says_what_the_weights_are():
    torch.manual_seed(1)
    first = QFormer(CONFIG, seed=1).state_dict()
    torch.manual_seed(2)
    same, other = QFormer(CONFIG, seed=1).state_dict(), QFormer(CONFIG, seed=2).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["queries"], other["queries"])


def test_places_are_added_to_the_features(model):
    placed = QFormer(replace(CONFIG, positions=6)).eval()
    placed.load_state_dict({**model.state_dict(), "image_position_embedding": torch.randn(6, 20)})
    x = features()
    assert_same(placed(x, TOKENS, MASK).text, model(x + placed.image_position_embedding, TOKENS, MASK).text)
    assert_same(placed.query(x).queries, model.query(x + placed.image_position_embedding).queries)
    with pytest.raises(ValueError, match="an image has 5 features, but there are positions for 6"):
        placed.query(x[:, :5])
