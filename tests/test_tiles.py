"""A picture that is seen whole and again in tiles: what the processor makes of it, and that small detail is seen."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minivlm import LLaVA, Processor
from minivlm.conversation import Turn, collate, encode_conversation, with_images
from minivlm.processor import ProcessorConfig
from minivlm.tasks import answer_all
from tests.speakers import language, llava_config, tokenizer

CONFIG = ProcessorConfig(image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestProcessor:
    @pytest.mark.parametrize("n", [2, 3])
    @pytest.mark.parametrize(
        "config",
        [
            CONFIG,
            replace(CONFIG, resize_to=20, crop="round"),
            replace(CONFIG, resize="squash", crop="none"),
        ],
        ids=["shortest", "larger", "squash"],
    )
    def test_a_picture_becomes_itself_and_the_tiles_of_a_larger_self(self, config, n):
        pictures = [noise(40, 64), noise(50, 30, seed=1)]
        views = Processor(None, replace(config, tiles=n)).images(pictures)
        assert views.shape == (2, 1 + n * n, 3, 16, 16)
        assert torch.equal(views[:, 0], Processor(None, config).images(pictures))
        larger = replace(config, image_size=16 * n, resize_to=config.resize_to and config.resize_to * n)
        large = Processor(None, larger).images(pictures)
        for i in range(n):
            for j in range(n):  # row by row
                tile = large[:, :, 16 * i : 16 * (i + 1), 16 * j : 16 * (j + 1)]
                assert torch.equal(views[:, 1 + n * i + j], tile)

    def test_no_pictures_no_views(self):
        assert Processor(None, replace(CONFIG, tiles=2)).images([]).shape == (0, 5, 3, 16, 16)

    @pytest.mark.parametrize(
        "changes",
        [{"resize": "none"}, {"crop": "none"}, {"resize": "squash", "crop": "none", "resize_to": 20}],
        ids=str,
    )
    def test_tiles_need_pictures_of_one_size(self, changes):
        with pytest.raises(ValueError, match="tiles need images of one size: resize to the shortest side and crop"):
            replace(CONFIG, tiles=2, **changes)
        replace(CONFIG, **changes)  # without tiles it is fine

    def test_a_picture_too_narrow_for_its_larger_self_shows_its_middle(self, monkeypatch):
        processor = Processor(None, replace(CONFIG, tiles=2))
        whole = processor.images([noise(4, 20)])  # 16 × 80, and 32 × 160
        monkeypatch.setattr("minivlm.datasets.images.MAX_PIXELS", 2000)
        torch.testing.assert_close(processor.images([noise(4, 20)]), whole, atol=0.03, rtol=0)


def striped(kind, rng):
    """32 × 32, lines one pixel wide over noise that is the same in each 2 × 2 pixels: their mean is that of the noise."""
    y, x = np.mgrid[:32, :32]
    lines = {"upright": x, "level": y, "checked": x + y}[kind] % 2
    base = rng.integers(80, 176, (16, 16, 3)).repeat(2, axis=0).repeat(2, axis=1)
    return (base + np.where(lines, 70, -70)[..., None]).astype(np.uint8)


KINDS = ("upright", "level", "checked")


def accuracy(tiles: int, *, steps=90) -> float:
    """Of a LLaVA that learns to name the kind of lines; its tower sees 16 × 16 pixels."""
    config = llava_config(tiles=tiles, vision_layers=(-1,), language=language(depth=1))
    # box: the overview is the mean over 2 × 2 pixels
    how = ProcessorConfig(
        image_size=16, resample="box", context=96, tiles=tiles, image_tokens=config.image_tokens, pad_token=0
    )
    model, processor = LLaVA(config), Processor(tokenizer(), how)
    names = dict(zip(KINDS, ("red", "green", "blue"), strict=True))  # words that the tokeniser knows
    samples = {
        kind: encode_conversation(
            [Turn("user", with_images("which colours?")), Turn("assistant", name)], processor, images=1
        )
        for kind, name in names.items()
    }
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = collate([samples[kind] for kind in KINDS * 8], processor.pad_token)
        images = processor.images([striped(kind, rng) for kind in KINDS * 8])
        optimiser.zero_grad()
        sum(model.losses(**batch, images=images).values()).backward()
        optimiser.step()
    kinds = KINDS * 20
    said = answer_all([([striped(kind, rng)], "which colours?") for kind in kinds], model, processor)
    return sum(text == names[kind] for text, kind in zip(said, kinds, strict=True)) / len(kinds)


def test_the_overview_alone_is_the_same_for_all_lines():
    one = Processor(None, replace(CONFIG, resample="box"))
    first, *others = (one.images([striped(kind, np.random.default_rng(0))]) for kind in KINDS)
    assert all(torch.equal(first, other) for other in others)


def test_tiles_help_where_small_detail_decides():
    assert accuracy(2) >= 0.95
    assert accuracy(1) <= 0.55  # chance is 0.33
