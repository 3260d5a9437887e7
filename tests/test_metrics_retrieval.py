"""Retrieval metrics against ten lines of brute force, numbers worked out by hand, and models that know nothing."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from minivlm.errors import UserError
from minivlm.metrics import Score, retrieval, zero_shot_accuracy
from minivlm.metrics.retrieval import by_ids, chance_precision, rank, recall_at_k


def brute_force(queries, candidates, query_ids, candidate_ids, ks):
    """The definition: sort all candidates, wrong before right on a tie, and walk down."""
    recalls, precisions = dict.fromkeys(ks, 0), []
    for q, query_id in zip(queries.double(), query_ids.tolist(), strict=True):
        cosines = (candidates.double() @ q).float().tolist()
        ranked = sorted(zip(cosines, candidate_ids.tolist(), strict=True), key=lambda c: (-c[0], c[1] == query_id))
        hits = [place for place, (_, candidate_id) in enumerate(ranked, start=1) if candidate_id == query_id]
        for k in ks:
            recalls[k] += hits[0] <= k
        precisions.append(sum(n / place for n, place in enumerate(hits, start=1)) / len(hits))
    return {**{f"R@{k}": n / len(queries) for k, n in recalls.items()}, "mAP": sum(precisions) / len(precisions)}


def unit(*shape, seed):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("block", [1, 100, 10_000])
@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
def test_it_agrees_with_brute_force(block, coarse):
    generator = torch.Generator().manual_seed(0)
    images, texts = unit(37, 8, seed=1), unit(61, 8, seed=2)
    if coarse:  # signs alone: most scores tie
        images, texts = images.sign(), texts.sign()
    image_ids = torch.arange(37) // 2  # two images share an id
    image_of_text = torch.cat([torch.arange(19), torch.randint(0, 19, (42,), generator=generator)])
    got = retrieval(images, texts, image_of_text, image_ids=image_ids, ks=(1, 3, 10), block=block)
    want = {
        "image→text": brute_force(images, texts, image_ids, image_of_text, (1, 3, 10)),
        "text→image": brute_force(texts, images, image_of_text, image_ids, (1, 3, 10)),
    }
    assert got.keys() == {f"{direction} {name}" for direction in want for name in want[direction]}
    for direction, name in itertools.product(want, ("R@1", "R@3", "R@10", "mAP")):
        assert got[f"{direction} {name}"].value == pytest.approx(want[direction][name], abs=1e-12), (direction, name)


def test_lists_say_what_no_ids_can():
    """Images 0 and 1 share caption 0, and each has one of its own: caption 1 is still wrong for image 1."""
    images, texts = torch.eye(3), torch.tensor([[0.6, 0.7, 0.0], [0.1, 0.9, 0.0], [0.0, 0.5, 0.0]])
    relevant = [[0, 1], [0, 2], [2]]
    got = retrieval(images, texts, relevant=relevant, ks=(1, 2))
    # image 1 ranks captions 1 (wrong), 0 (right), 2 (right); image 2 has none above zero: ties count against it
    assert got["image→text R@1"].value == pytest.approx(1 / 3)
    assert got["image→text R@2"].value == pytest.approx(2 / 3)
    assert got["text→image R@1"].value == pytest.approx(2 / 3)
    same = retrieval(images, texts, torch.tensor([0, 1, 2]), ks=(1, 2))
    assert retrieval(images, texts, relevant=[[0], [1], [2]], ks=(1, 2)) == same


def test_a_case_worked_out_by_hand():
    """One image with two captions (ids 0, 0) beside two strangers; the captions stand at places 2 and 4 of 4."""
    image = torch.tensor([[1.0, 0.0]])
    cosines = torch.tensor([0.8, 0.2, 0.9, 0.5])  # right, right, wrong, wrong
    texts = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    first, precision, _ = rank(image, texts, by_ids(torch.tensor([0]), torch.tensor([0, 0, 1, 2])), what="test")
    assert first.tolist() == [2]
    assert precision.tolist() == pytest.approx([(1 / 2 + 2 / 4) / 2])


def test_a_perfect_model_scores_one_and_rows_pair_up_by_default():
    features = torch.eye(12)
    scores = retrieval(features, features)
    assert {name: score.value for name, score in scores.items()} == dict.fromkeys(scores, 1.0)
    assert scores["text→image R@1"].chance == pytest.approx(1 / 12)
    assert scores["text→image R@5"].chance == pytest.approx(5 / 12)


def test_a_collapsed_model_gets_nothing():
    """One vector for everything: ties count against the model, at every place of a block."""
    one = F.normalize(torch.linspace(0.1, 3, 97), dim=0)
    scores = retrieval(one.expand(203, -1), one.expand(203, -1), block=1000)
    assert scores["image→text R@10"].value == scores["text→image R@1"].value == 0
    assert scores["image→text mAP"].value == pytest.approx(1 / 203)
    accuracy = zero_shot_accuracy(one.expand(50, -1), one.expand(7, -1), torch.arange(50) % 7)
    assert accuracy["top-1"].value == accuracy["top-5"].value == accuracy["mean per class"].value == 0


@pytest.mark.parametrize(("G", "R"), [(1, 1), (5, 1), (5, 2), (6, 6), (6, 3)])
def test_chance_is_the_mean_over_all_orders(G, R):
    """Exactly: every set of places that the R right candidates may take is as likely as any other."""
    orders = list(itertools.combinations(range(1, G + 1), R))
    precision = sum(sum(n / place for n, place in enumerate(hits, 1)) / R for hits in orders) / len(orders)
    right = torch.tensor([R])
    assert chance_precision(right, G) == pytest.approx(precision, abs=1e-12)
    for k in (1, 2, 5, 10):
        recall = sum(hits[0] <= k for hits in orders) / len(orders)
        assert recall_at_k(torch.tensor([1]), right, G, k) == Score(1.0, pytest.approx(recall, abs=1e-12))


def test_random_features_score_what_chance_says():
    n, captions = 400, 3
    scores = retrieval(unit(n, 16, seed=3), unit(n * captions, 16, seed=4), torch.arange(n).repeat(captions))
    for name, score in scores.items():
        spread = math.sqrt(score.chance / n)  # of a mean of n, roughly
        assert abs(score.value - score.chance) < 4 * spread, (name, score)


def test_zero_shot_accuracy_by_hand():
    classes = torch.eye(6)
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    images = torch.eye(6)[[0, 0, 1, 1, 3, 2]]  # class 0: 2 of 3, class 1: 1 of 1, class 2: 1 of 2
    scores = zero_shot_accuracy(images, classes, labels)
    assert scores["top-1"] == Score(pytest.approx(4 / 6), pytest.approx(1 / 6))
    assert scores["mean per class"] == Score(pytest.approx((2 / 3 + 1 + 1 / 2) / 3), pytest.approx(1 / 6))
    assert scores["top-5"] == Score(pytest.approx(4 / 6), pytest.approx(5 / 6))  # a tie with all others is a miss


def test_zero_shot_accuracy_is_retrieval_of_the_class():
    images, classes = unit(200, 8, seed=5), unit(12, 8, seed=6)
    labels = torch.arange(200) % 12
    cosines = images @ classes.T
    top5 = cosines.topk(5).indices
    scores = zero_shot_accuracy(images, classes, labels)
    assert scores["top-1"].value == pytest.approx((cosines.argmax(1) == labels).double().mean())
    assert scores["top-5"].value == pytest.approx((top5 == labels[:, None]).any(1).double().mean())


def test_low_precision_features_and_plain_lists_are_taken():
    features = torch.eye(4, dtype=torch.bfloat16)
    assert retrieval(features, features, [0, 1, 2, 3])["image→text R@1"].value == 1


def test_what_cannot_be_measured_is_refused():
    features = torch.eye(3)
    with pytest.raises(UserError, match="text→image: query 2 has no right answer among the candidates"):
        retrieval(features[:2], features, [0, 1, 7])
    with pytest.raises(UserError, match="NaN"):
        retrieval(features, features * math.nan)
    with pytest.raises(UserError, match="there are no queries"):
        retrieval(features[:0], features[:0])
    with pytest.raises(ValueError, match="3 candidates, but relevance is given for 2"):
        retrieval(features, features, [0, 1])
    with pytest.raises(ValueError, match="-1…2, but there are 3 classes"):
        zero_shot_accuracy(features, features, [-1, 0, 2])
