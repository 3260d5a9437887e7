"""Neighbours by brute force, retrieval by the published protocol on random features, and what a linear probe promises."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minivlm.errors import UserError
from minivlm.metrics import retrieval
from minivlm.metrics.caption_retrieval import caption_retrieval, random_median
from minivlm.metrics.probes import choose_strength, fit_linear_probe, hold_out, nearest_neighbours
from minivlm.metrics.retrieval import mean_per_class


def unit(*shape, seed):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_neighbours_vote_as_brute_force_says(k, monkeypatch):
    monkeypatch.setattr("minivlm.metrics.probes.BLOCK", 100)  # queries in several parts
    known, queries = 3 * unit(40, 5, seed=0), 2 * unit(17, 5, seed=1)  # lengths do not matter
    labels = torch.arange(40) % 6
    votes = nearest_neighbours(known, labels, queries, k=k, classes=7)
    for query, got in zip(queries.tolist(), votes.tolist(), strict=True):
        cosine = lambda other, query=query: (
            sum(a * b for a, b in zip(query, other, strict=True)) / (math.hypot(*query) * math.hypot(*other))
        )
        nearest = sorted(
            ((cosine(other), label) for other, label in zip(known.tolist(), labels.tolist(), strict=True))
        )[-k:]
        want = [sum(math.exp(c / 0.07) for c, label in nearest if label == one) for one in range(7)]
        assert got == pytest.approx(want, rel=1e-4)


def test_neighbours_that_are_not_there_and_features_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="20 neighbours are asked for, but there are 4"):
        nearest_neighbours(torch.eye(4), torch.arange(4), torch.eye(4), k=20, classes=4)
    bad = torch.eye(4) * math.nan
    for fit in (
        lambda: nearest_neighbours(torch.eye(4), torch.arange(4), bad, k=1, classes=4),
        lambda: fit_linear_probe(bad, torch.arange(4), classes=4, strength=1.0),
        lambda: choose_strength(torch.eye(4), torch.arange(4), bad, torch.arange(4), classes=4),
    ):
        with pytest.raises(UserError, match="NaN or infinity"):
            fit()


def test_the_probe_sits_where_its_objective_has_no_slope():
    x, labels = torch.randn(60, 4, generator=torch.Generator().manual_seed(2)) * 9 + 4, torch.arange(60) % 3
    fitted = fit_linear_probe(x, labels, classes=3, strength=0.5, tolerance=1e-8)
    p = fitted(x).softmax(dim=1) - F.one_hot(labels, 3)
    standard = (x.double() - fitted.mean) / fitted.deviation
    torch.testing.assert_close(p.T @ standard + 0.5 * fitted.weight, torch.zeros(3, 4).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(p.sum(dim=0), torch.zeros(3).double(), atol=1e-4, rtol=0)  # the bias is not penalised
    other = fit_linear_probe(
        x, labels, classes=3, strength=0.5, tolerance=1e-8, start=fit_linear_probe(x, labels, classes=3, strength=9.0)
    )
    torch.testing.assert_close(other.weight, fitted.weight, atol=1e-4, rtol=0)


def test_a_channel_that_never_changes_does_no_harm():
    x = torch.cat([unit(30, 3, seed=3), torch.full((30, 2), 0.1)], dim=1)
    fitted = fit_linear_probe(x, torch.arange(30) % 2, classes=2, strength=1.0)
    assert fitted.weight.isfinite().all() and fitted.weight[:, 3:].abs().max() < 1e-3


def test_a_part_is_held_out_of_each_class_that_has_two():
    labels = [0] * 10 + [1] * 2 + [2] + [3] * 3
    kept, held = hold_out(labels, 0.2)
    assert sorted(kept + held) == list(range(16)) and [labels[i] for i in held] == [0, 0, 1, 3]
    assert hold_out(labels, 0.2) == (kept, held) != hold_out(labels, 0.2, seed=1)


# ---- five captions an image ------------------------------------------------------------------------------------------


def published(images, texts, of):
    """R@K, median rank and rsum in the way of the published scripts: sort each row, look where the first right one stands."""
    similarity = (images.double() @ texts.double().T).numpy()
    ranks = {"image→text": [], "text→image": []}
    for i, row in enumerate(similarity):
        order = np.argsort(-row)
        ranks["image→text"].append(min(int(np.where(order == j)[0][0]) for j in np.flatnonzero(of == i)))
    for j, row in enumerate(similarity.T):
        ranks["text→image"].append(int(np.where(np.argsort(-row) == of[j])[0][0]))
    scores = {}
    for direction, places in ranks.items():
        places = np.array(places)
        scores |= {f"{direction} R@{k}": (places < k).mean() for k in (1, 5, 10)}
        scores[f"{direction} median rank"] = math.floor(np.median(places)) + 1
    return scores | {"rsum": 100 * sum(value for name, value in scores.items() if "R@" in name)}


def five(n, seed):
    images = unit(n, 16, seed=seed)
    texts = F.normalize(images.repeat_interleave(5, dim=0) + 1.2 * unit(5 * n, 16, seed=seed + 1), dim=1)
    return images, texts, np.arange(n).repeat(5)


def test_five_captions_an_image_are_counted_as_published():
    images, texts, of = five(60, seed=4)
    got = caption_retrieval(images, texts, of)
    want = published(images, texts, of)
    assert {name: score.value for name, score in got.items()} == pytest.approx(want, abs=1e-9)
    assert got["image→text R@1"].n == 60 and got["text→image R@1"].n == 300
    for score in got.values():
        low, high = score.interval
        assert low <= score.value <= high
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    again = caption_retrieval(images, texts[shuffled], of[shuffled.numpy()])
    assert {name: score.value for name, score in again.items()} == pytest.approx(want, abs=1e-9)
    assert again["rsum"].interval == pytest.approx(got["rsum"].interval)


def test_folds_are_the_mean_over_parts_of_the_images():
    images, texts, of = five(60, seed=6)
    parts = [published(images[a : a + 20], texts[5 * a : 5 * a + 100], of[:100]) for a in (0, 20, 40)]
    got = caption_retrieval(images, texts, of, fold=20)
    for name in got.keys() - {"image→text median rank", "text→image median rank"}:
        assert got[name].value == pytest.approx(np.mean([part[name] for part in parts]))
    assert got["text→image R@5"].chance == pytest.approx(5 / 20)
    with pytest.raises(UserError, match="60 images cannot be judged in folds of 25"):
        caption_retrieval(images, texts, of, fold=25)


def test_the_same_caption_of_two_images_is_two_candidates_as_published_and_one_where_captions_are_distinct():
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 0, 2]]  # image 1 has the caption of image 0
    ours = retrieval(images, texts[[0, 2]], relevant=[[0], [0], [1]], ks=(1,))
    official = caption_retrieval(images, texts, [0, 1, 2])
    assert ours["text→image R@1"].value == 1
    assert official["text→image R@1"].value == pytest.approx(2 / 3)


def test_the_median_of_a_random_order():
    assert random_median(9, 1) == 5 and random_median(1, 1) == 1
    rng = np.random.default_rng(0)
    firsts = [rng.permutation(100)[:5].min() + 1 for _ in range(4000)]
    assert abs(random_median(100, 5) - np.median(firsts)) <= 1


def test_the_mean_per_class_is_the_same_with_and_without_a_column_for_each_class(monkeypatch):
    rng = np.random.default_rng(0)
    labels, right = rng.integers(0, 5, 400), rng.random(400) < 0.7
    labels[labels == 3] = 0  # a class that does not occur, and a frequent one
    names = [f"{i}.png" for i in range(400)]
    want = np.mean([right[labels == c].mean() for c in (0, 1, 2, 4)])
    columns = mean_per_class(right, labels, names)
    monkeypatch.setitem(mean_per_class.__globals__, "DENSE", 0)
    weights = mean_per_class(right, labels, names)
    assert columns.value == pytest.approx(want) == pytest.approx(weights.value)
    assert columns.n == weights.n == 400 and columns.ids == weights.ids == tuple(names)
    assert np.allclose(columns.interval(), weights.interval(), atol=0.02)
