from dataclasses import replace

import torch

from minivlm.layers import BERTConfig, ImageFeatures
from minivlm.models.visualbert import VisualBERT, VisualBERTConfig
from minivlm.testing import assert_same

CONFIG = VisualBERTConfig(
    text=BERTConfig(vocab_size=40, context=10, width=24, depth=3, heads=2),
    region_width=12,
    answers=("yes", "no", "two"),
)
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 9, 3, 2, 0, 0]])
MASK = TOKENS != 0


def test_visualbert_answers_at_the_last_word_or_at_the_first():
    images = torch.randn(2, 4, 12)
    last = VisualBERT(CONFIG).eval()
    words = last(images, TOKENS, MASK).text
    assert_same(last.answer(images, TOKENS, MASK), last.answer_head(torch.stack([words[0, 4], words[1, 2]])))
    first = VisualBERT(replace(CONFIG, answer_at="first")).eval()
    out = first(images, TOKENS, MASK)
    assert_same(out.logits["answers"], first.answer_head(out.pooled))
    assert_same(out.pooled, first.pooler(out.text[:, 0]).tanh())


def test_features_of_a_detector_may_have_their_older_name():
    model, features = VisualBERT(CONFIG).eval(), torch.randn(2, 4, 12)
    older = model(None, TOKENS, MASK, features=features).logits["answers"]
    assert older.equal(model(ImageFeatures(features), TOKENS, MASK).logits["answers"])
