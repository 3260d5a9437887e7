from dataclasses import replace

import torch

from minivlm.layers import BERTConfig, TransformerConfig
from minivlm.models.joint_encoder import find_regions
from minivlm.models.vilbert import ViLBERT, ViLBERTConfig
from minivlm.testing import assert_same

CONFIG = ViLBERTConfig(
    text=BERTConfig(vocab_size=40, context=10, width=24, depth=3, heads=2),
    regions=TransformerConfig(width=16, depth=2, heads=2, norm_place="post"),
    region_width=12,
    connections=1,
    joint_heads=2,
    joint_width=20,
)
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 9, 3, 2, 0, 0]])
MASK = TOKENS != 0


def test_vilberts_streams_meet_before_their_last_blocks():
    images = torch.randn(2, 4, 12)
    model = ViLBERT(CONFIG).eval()
    states = model(images, TOKENS, MASK)
    words, regions = model.bert.embed(TOKENS), model.embed_regions(find_regions(model, images))
    text, seen = model.bert.transformer.blocks, model.region_transformer.blocks
    words, regions = text[1](text[0](words, mask=MASK), mask=MASK), seen[0](regions)
    words, regions = model.connections[0](words, regions, MASK)
    assert_same(states.text, text[2](words, mask=MASK))
    assert_same(states.regions, seen[1](regions))


def test_vilbert_without_connections_has_two_streams_that_never_meet():
    images = torch.randn(2, 4, 12)
    model = ViLBERT(replace(CONFIG, connections=0)).eval()
    assert_same(model(images.flip(0), TOKENS, MASK).text, model(images, TOKENS, MASK).text)
