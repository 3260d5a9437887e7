"""Scores of a model that matches: whether it detects the one word that makes a caption false; and if it compares as well,
whether a search gets better when the best few that comparing found are put in order by matching.

matching, colour   of true captions and of those false by one attribute (datasets/shapes/negatives.py), how many are told
                   apart at probability 1/2; both count alike, so that always saying yes is worth 50 %
R@1 re-ranked      the first of the RERANK most similar ones after sorting them by matching
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm.datasets.folder import open_pairs
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld, is_world
from minivlm.datasets.shapes.negatives import one_attribute_negatives
from minivlm.layers.tower import ImageFeatures
from minivlm.metrics import Score
from minivlm.metrics.retrieval import rank_block, recall_at_k
from minivlm.pictures import Row, sheet, wrap
from minivlm.tasks.features import inference, to_tokens
from minivlm.tasks.match import RERANK, features_of_all, match_all, match_pairs

SPLITS = {"test": "", "unseen": "never-seen pairs, "}
AT_A_TIME = 250  # images in memory
PICTURED, TILE = 12, 176  # images on a sheet, and their pixels


def matching(model, processor, directory: str | Path) -> dict[str, Score]:
    """All scores on the held-out part of a dataset, by name, in the order of the table."""
    scores = {}
    for split, name in SPLITS.items() if is_world(directory) else [("test", "")]:
        pairs = open_pairs(directory, split, image_size=processor.image_size)
        features = features_of_split(model, processor, pairs)
        found = hard_negatives(model, processor, pairs, features) if isinstance(pairs, ShapesWorld) else {}
        if "encode" in model.abilities:
            found |= reranking(model, processor, pairs, features)
        scores |= {f"{name}{key}": score for key, score in found.items()}
    return scores


def features_of_split(model, processor, pairs: Pairs) -> Tensor:
    """(N, L, C): the features of every image of a split."""
    parts = np.array_split(np.arange(len(pairs)), -(-len(pairs) // AT_A_TIME))
    return torch.cat([features_of_all(list(pairs.images(part)), model, processor) for part in parts])


def matching_accuracy(model, processor, directory: str | Path) -> float:
    """Of the validation split, one number: on the shapes world the hard negatives, elsewhere text→image R@1 re-ranked."""
    pairs = open_pairs(directory, "val", image_size=processor.image_size)
    features = features_of_split(model, processor, pairs)
    if isinstance(pairs, ShapesWorld):
        return hard_negatives(model, processor, pairs, features)["matching"].value
    return reranking(model, processor, pairs, features)["text→image R@1 re-ranked"].value


def matching_sheet(model, processor, directory: str | Path, path: Path) -> None:
    """Draw held-out images, each with a true caption and a false one, and their probabilities."""
    pairs = open_pairs(directory, "test", image_size=processor.image_size)
    indices = range(0, len(pairs), max(1, len(pairs) // PICTURED))[:PICTURED]
    rng, tiles = np.random.default_rng(0), {}  # what is wrong → (image, are both judged right?, note)
    for n, i in enumerate(indices):
        true, wrong, kind = pairs.all_captions(i)[0], pairs.all_captions(indices[n - 1])[0], "of another image"
        if isinstance(pairs, ShapesWorld):
            scene = pairs.scenes[i]
            false = one_attribute_negatives(scene, scene.objects, rng)
            wrong, kind = false[n % len(false)]
        [image] = pairs.images([i])
        yes, no = match_all([image], [true, wrong], model, processor, cut=True)[0].tolist()
        note = "\n".join(wrap(f"{yes:.0%} {true}", 13, TILE) + wrap(f"{no:.0%} {wrong}", 13, TILE))
        tiles.setdefault(kind, []).append((image, yes >= 0.5 > no, note))
    rows = [Row(f"false: {kind}", *zip(*some, strict=True)) for kind, some in tiles.items()]
    sheet(rows, title="How probable a true and a false caption are", tile=TILE, columns=4).save(path)


# ---- hard negatives --------------------------------------------------------------------------------------------------


def hard_negatives(model, processor, world: ShapesWorld, features: Tensor) -> dict[str, Score]:
    """{"matching": Score, "matching, colour": …}: balanced accuracy on true captions and those false by one attribute."""
    rng = np.random.default_rng(0)
    samples = []  # (image, caption, "" or what is wrong with it)
    for i, scene in enumerate(world.scenes.read(np.arange(len(world)))):
        samples.append((i, world.all_captions(i)[0], ""))
        samples += [(i, *false) for false in one_attribute_negatives(scene, scene.objects, rng)]
    tokens, mask = to_tokens([text for _, text, _ in samples], processor, cut=True)
    images = torch.tensor([i for i, _, _ in samples])
    odds = match_pairs(torch.stack([images, torch.arange(len(samples))], dim=1), features, tokens, mask, model)
    return told_apart([wrong for _, _, wrong in samples], odds)


def told_apart(wrong: Sequence[str], odds: Tensor) -> dict[str, Score]:
    """wrong: what is wrong with each caption, "" for a true one; odds (P,): the log-odds that it matches."""
    yes = {kind: [] for kind in dict.fromkeys(wrong)}
    for kind, matches in zip(wrong, (odds >= 0).tolist(), strict=True):
        yes[kind].append(matches)
    accepted = np.mean(yes.pop(""))
    refused = {kind: 1 - np.mean(matches) for kind, matches in yes.items()}
    in_all = 1 - np.mean([matches for some in yes.values() for matches in some])
    names = {"matching": in_all, **{f"matching, {kind}": share for kind, share in refused.items()}}
    return {name: Score(float((accepted + share) / 2), 0.5) for name, share in names.items()}


# ---- retrieval -------------------------------------------------------------------------------------------------------


def reranking(model, processor, pairs: Pairs, features: Tensor, *, k: int = RERANK) -> dict[str, Score]:
    """Recall@1 in both directions, by comparing alone and with the k most similar put in order by matching."""
    captions = [pairs.all_captions(i) for i in range(len(pairs))]
    number = {text: j for j, text in enumerate(dict.fromkeys(text for known in captions for text in known))}
    relevant = torch.zeros(len(captions), len(number), dtype=torch.bool)
    for i, known in enumerate(captions):
        relevant[i, [number[text] for text in known]] = True
    tokens, mask = to_tokens(list(number), processor, cut=True)
    similar = similarities(model, features, tokens, mask)  # (N, M)
    to_text, to_image = most_similar(similar, k), most_similar(similar.T, k).T
    matched = torch.full_like(similar, -torch.inf)
    wanted = to_text | to_image  # a pair that both directions ask for is matched once
    matched[wanted] = match_pairs(wanted.nonzero(), features, tokens, mask, model)
    scores = {}
    for direction, first, second, right in (
        ("text→image", similar.T, matched.masked_fill(~to_image, -torch.inf).T, relevant.T),
        ("image→text", similar, matched.masked_fill(~to_text, -torch.inf), relevant),
    ):
        scores[f"{direction} R@1"] = recall_at_1(first, right)
        scores[f"{direction} R@1 re-ranked"] = recall_at_1(second, right)
    return scores


def similarities(model, features: Tensor, tokens: Tensor, mask: Tensor, *, batch_size: int = 128) -> Tensor:
    """(N, M): how similar each image, in its best query, is to each text."""
    with inference(model):
        images = [model.encode_image(ImageFeatures(part)).float() for part in features.split(batch_size)]
        texts = [
            model.encode_text(t.to(model.device), m.to(model.device)).float()
            for t, m in zip(tokens.split(batch_size), mask.split(batch_size), strict=True)
        ]
        texts = torch.cat(texts)
        return torch.cat([model.similarity(part, texts).float().cpu() for part in images])


def most_similar(similar: Tensor, k: int) -> Tensor:
    """True for the k highest of each row of (N, M)."""
    best = similar.topk(min(k, similar.shape[1]), dim=1).indices
    return torch.zeros_like(similar, dtype=torch.bool).scatter_(1, best, True)


def recall_at_1(scores: Tensor, right: Tensor) -> Score:
    ranks, _, count = rank_block(scores.contiguous(), right.contiguous())
    return recall_at_k(ranks, count, scores.shape[1], 1)
