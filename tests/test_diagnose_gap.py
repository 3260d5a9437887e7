"""The modality gap: found where it is planted, undone by mean-shift, and drawn."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.evaluate.diagnose import diagnose
from minivlm.evaluate.diagnose.clouds import IMAGES, TEXTS, clouds, plane
from minivlm.evaluate.diagnose.modality_gap import (
    DISTANCE,
    MIXED,
    PAIRS,
    SHARE,
    Means,
    Vectors,
    cross_fitted,
    figures,
    vectors_of,
    verdict,
)
from minivlm.evaluate.diagnose.modality_gap import IMAGES as ALIKE
from minivlm.layers import TextConfig, VisionConfig
from minivlm.metrics import Score
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor


def planted(apart: float, *, n=200, width=32, queries=1, seed=0) -> Vectors:
    """Pairs that nearly agree, and in every text a constant vector beside what it has in common with its image."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.double)
    x = F.normalize(draw(n, width), dim=-1)
    constant = apart * F.normalize(torch.ones(width, dtype=torch.double), dim=-1)
    y = F.normalize(x + 0.05 * draw(n, width) + constant, dim=-1)
    images = torch.stack([x, *(F.normalize(draw(n, width), dim=-1) for _ in range(queries - 1))], dim=1)
    return Vectors(images, y, [[i] for i in range(n)], tuple(map(str, range(n))))


def test_the_distance_is_that_of_the_means_and_its_interval_lies_around_it():
    vectors = planted(1.0)
    found = figures(vectors)[DISTANCE]
    x, y = vectors.images[:, 0], vectors.texts
    assert found.value == pytest.approx((x.mean(dim=0) - y.mean(dim=0)).norm().item(), abs=1e-12)
    assert found.interval[0] < found.value < found.interval[1] and found.n == 200
    share = figures(vectors)[SHARE].value
    assert share == pytest.approx(found.value**2 / (x - y).square().sum(dim=1).mean().item())


def test_cosines_are_those_of_all_pairs_and_of_all_others():
    vectors = planted(0.5, n=20)
    x, y = vectors.images[:, 0].numpy(), vectors.texts.numpy()
    found, off = figures(vectors), ~np.eye(20, dtype=bool)
    assert found[PAIRS].value == pytest.approx(np.diag(x @ y.T).mean())
    assert found[PAIRS].chance == pytest.approx((x @ y.T)[off].mean())
    assert found[ALIKE].value == pytest.approx((x @ x.T)[off].mean())


def test_a_constant_vector_in_one_modality_is_found_and_mean_shift_undoes_it():
    test, val = planted(3.0), planted(3.0, n=400)
    before = figures(test)
    assert before[DISTANCE].value > 0.9 and before[MIXED].value < 0.3
    assert verdict(before).startswith("found: the centroids are 0.9")
    assert before[SHARE].interval[0] > 0.5
    after = figures(Means.of(val).shift(test))
    for name, better in ((DISTANCE, -1), (SHARE, -1), (PAIRS, 1), (MIXED, 1)):
        moved = after[name].samples.paired(before[name].samples)
        assert better * moved.low > 0 and better * moved.high > 0  # by more than its interval
    assert after[DISTANCE].value < 0.15 and verdict(after).startswith("not found")


def test_no_gap_is_not_found():
    assert verdict(figures(planted(0.0))).startswith("not found")
    assert figures(planted(0.0))[DISTANCE].value < 2 * figures(planted(0.0))[DISTANCE].chance


def test_a_temperature_changes_no_ranking():
    """What the remedy says: logits are cosines by one factor."""
    similar = torch.einsum("nqd,md->nqm", *planted(1.0)[:2]).amax(dim=1)
    assert torch.equal(similar.argsort(dim=1), (100 * similar).argsort(dim=1))


def test_of_several_vectors_of_an_image_the_closest_counts():
    one, several = planted(1.0), planted(1.0, queries=4)
    assert torch.equal(several.paired[0], one.paired[0])


def test_without_other_images_each_half_is_shifted_by_the_other():
    vectors = planted(3.0)
    shifted = cross_fitted(vectors)
    odd = vectors.images[1::2, 0].mean(dim=0)
    assert torch.allclose(shifted.images[0, 0], F.normalize(vectors.images[0, 0] - odd, dim=-1))
    assert figures(shifted)[DISTANCE].value < 0.2 < figures(vectors)[DISTANCE].value


def test_the_plane_is_that_of_the_two_largest_variances():
    random = np.random.default_rng(0)
    turned = np.linalg.qr(random.normal(size=(6, 6)))[0]
    flat = random.normal(size=(300, 6)) * [5, 3, 0.1, 0.1, 0.1, 0.1]
    x, y = (torch.from_numpy(part @ turned) for part in (flat[:150], flat[150:]))
    a, b, shares = plane(x, y)
    assert math.isclose(sum(shares), 34 / 34.04, abs_tol=0.01) and shares[0] > shares[1]
    whole, seen = torch.cat([x, y]), torch.cat([a, b])
    assert torch.allclose(torch.pdist(whole), torch.pdist(seen), atol=1.5)


def test_both_clouds_are_drawn_with_their_pairs():
    vectors = planted(3.0, n=30)
    page = np.asarray(clouds({"before": vectors.paired, "after": vectors.paired}, data="a folder"))
    for colour in (IMAGES, TEXTS):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (page == rgb).all(axis=-1).sum() > 30 * 20
    assert np.asarray(clouds({"": (torch.ones(2, 1), torch.ones(2, 1))}, data="")).ndim == 3  # one axis, no variance


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=16, image_size=32, progress=False)
    return directory


def test_a_clip_whose_texts_are_pushed_aside_is_diagnosed(world):
    processor = Processor.train(ShapesWorld(world, "train").texts(), vocab_size=300, image_size=32, context=96)
    ids = dict(vocab_size=processor.vocab_size, end_token=processor.end_token)
    vision = VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2)
    text = TextConfig(width=16, depth=1, heads=2, context=96, **ids)
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_width=16, text_projection_bias=True))
    model.text_projection.bias.data[0] = 9.0
    [found] = diagnose(model, processor, world, ["modality-gap"])
    assert found.verdict.startswith("found") and found.image is not None
    before, after = found.effect[f"mean-shift: {DISTANCE}"]
    assert after.samples.paired(before.samples).high < -0.5


def gap_after(world, temperature: float, *, steps: int) -> Score:
    """The gap's share of what sets a pair apart, once a tiny CLIP has learned so long at this temperature, which stays."""
    train, test, rng = ShapesWorld(world, "train"), ShapesWorld(world, "test"), np.random.default_rng(0)
    processor = Processor.train(test.texts(), vocab_size=300, image_size=32, context=96)
    ids = dict(vocab_size=processor.vocab_size, end_token=processor.end_token)
    vision = VisionConfig(image_size=32, patch_size=8, width=64, depth=1, heads=2, stem="convolutions")
    text = TextConfig(width=64, depth=1, heads=2, context=96, **ids)
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_width=32, initial_temperature=temperature))
    model.freeze("loss")
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        indices = rng.integers(0, len(train), 64)
        tokens, mask = processor.text(train.captions(indices, rng), cut=True)
        optimiser.zero_grad()
        model.losses(processor.images([*train.images(indices)]), tokens, mask)["contrast"].backward()
        optimiser.step()
    return figures(vectors_of(model.eval(), processor, test))[SHARE]


def test_a_higher_temperature_in_training_closes_the_gap(tmp_path):
    """As in Liang et al. 2022, §4; docs/pitfalls.md has it after 600 steps."""
    make_shapes(tmp_path / "world", train=2000, image_size=32, progress=False)
    high, low = (gap_after(tmp_path / "world", temperature, steps=100) for temperature in (0.5, 0.01))
    assert high.interval[1] < 0.5 < 0.9 < low.interval[0]
