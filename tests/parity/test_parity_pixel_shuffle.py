"""Pixel shuffle against transformers' Idefics3, whose order of channels published projectors were trained with."""

import pytest
import torch

from minivlm.layers.projector import pixel_shuffle

pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")


@pytest.mark.parametrize(("grid", "side"), [(4, 2), (6, 3), (8, 4), (5, 5)])
def test_features_are_folded_as_idefics3_folds_them(grid, side):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    x = torch.randn(2, grid * grid, 7)
    assert torch.equal(pixel_shuffle(x, side), Idefics3Connector.pixel_shuffle(None, x, side))
