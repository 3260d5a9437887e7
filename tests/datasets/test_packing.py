"""Texts packed side by side: nothing is lost, and none of them sees another."""

import pytest
import torch

from minivlm.conversation import IGNORED, Sample, collate
from minivlm.datasets.packing import pack
from minivlm.layers import LanguageModel, LanguageModelConfig

ROWS = [[1, 5, 6, 7], [1, 8, 9], [1, 5, 5, 9, 7, 3], [1, 4]]
LEARNT = [[1, 5, 6, 7], [1, 8, 9], [IGNORED, IGNORED, 5, 9, IGNORED, 3], [1, 4]]  # the third is a conversation
SAMPLES = [Sample(row, labels, []) for row, labels in zip(ROWS, LEARNT, strict=True)]


def model(**changes):
    config = dict(width=16, depth=2, heads=2, vocab_size=12, context=10) | changes
    return LanguageModel(LanguageModelConfig(**config), seed=1).eval()


def test_every_text_has_a_place_and_its_first_token_no_label():
    batch = pack(SAMPLES, 10, pad_token=0)
    assert batch["tokens"].tolist() == [[1, 5, 6, 7, 1, 8, 9, 1, 4], [1, 5, 5, 9, 7, 3, 0, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 3, 3], [1] * 6 + [0] * 3]
    none = IGNORED
    assert batch["labels"].tolist() == [
        [none, 5, 6, 7, none, 8, 9, none, 4],
        [none, none, 5, 9, none, 3, none, none, none],
    ]


@pytest.mark.parametrize("changes", [{}, {"positions": "none", "rope_theta": 100.0}], ids=["learned", "rotary"])
def test_the_loss_is_that_of_the_texts_apart(changes):
    m = model(**changes)
    apart = m.losses(**collate(SAMPLES, 0))["next token"]
    together = m.losses(**pack(SAMPLES, 10, 0))["next token"]
    torch.testing.assert_close(together, apart)


def test_no_text_sees_another():
    m, batch = model(), pack(SAMPLES, 10, 0)
    segments = batch["segments"]
    mask = segments[:, :, None] == segments[:, None, :]
    before = m(batch["tokens"], mask).hidden
    changed = batch["tokens"].clone()
    changed[0, 1] = 11  # in the first text of the first row
    after = m(changed, mask).hidden
    assert torch.equal(after[0, 4:], before[0, 4:]) and not torch.equal(after[0, 1:4], before[0, 1:4])


def test_a_text_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="a text of 6 tokens does not fit a context of 5"):
        pack(SAMPLES, 5, 0)
