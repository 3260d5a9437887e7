"""Scores of a model that matches: whether it detects the one word that makes a caption false; and if it compares as well,
whether a search gets better when the best few that comparing found are put in order by matching.

matching, colour   of true captions and of those false by one attribute (datasets/shapes/negatives.py), how many are told
                   apart at probability 1/2; both count alike, so that always saying yes is worth 50 %
R@1 re-ranked      the first of the RERANK most similar ones after sorting them by matching
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minivlm.datasets.folder import open_pairs
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld, is_world
from minivlm.datasets.shapes.negatives import one_attribute_negatives
from minivlm.evaluate.compare import distinct_captions
from minivlm.evaluate.expectation import some_of
from minivlm.layers.tower import ImageFeatures
from minivlm.metrics import Samples, Score
from minivlm.metrics.retrieval import Relevance, by_lists, first_query, rank_block, recall_at_k
from minivlm.pictures import Row, sheet, wrap
from minivlm.processes import each
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


def features_of_split(model, processor, pairs: Pairs, indices: Sequence[int] | None = None) -> Tensor:
    """(N, L, C): the features of every image of a split, or of these."""
    indices = np.arange(len(pairs)) if indices is None else np.asarray(indices)
    parts = np.array_split(indices, -(-len(indices) // AT_A_TIME))
    features = each(lambda part: features_of_all(list(pairs.images(part)), model, processor), parts)
    return torch.cat(features).to(model.device)


def matching_accuracy(model, processor, directory: str | Path, *, most: int | None = None) -> float:
    """Of the validation split, one number: on the shapes world the hard negatives, elsewhere text→image R@1 re-ranked, of
    `most` images."""
    pairs = open_pairs(directory, "val", image_size=processor.image_size)
    if isinstance(pairs, ShapesWorld):
        return hard_negatives(model, processor, pairs, features_of_split(model, processor, pairs))["matching"].value
    indices = some_of(len(pairs), most or len(pairs))
    features = features_of_split(model, processor, pairs, indices)
    return reranking(model, processor, pairs, features, indices=indices)["text→image R@1 re-ranked"].value


def matching_sheet(model, processor, directory: str | Path, path: Path) -> None:
    """Draw `matching_rows`."""
    rows = matching_rows(model, processor, directory)
    sheet(rows, title="How probable a true and a false caption are", tile=TILE, columns=4).save(path)


def matching_rows(model, processor, directory: str | Path) -> list[Row]:
    """Held-out images, each with a true caption and a false one, and their probabilities; a row for each kind of fault."""
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
    return [Row(f"false: {kind}", *zip(*some, strict=True)) for kind, some in tiles.items()]


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
    return told_apart([wrong for _, _, wrong in samples], odds, [world.key(i) for i in images.tolist()])


def told_apart(wrong: Sequence[str], odds: Tensor, images: Sequence[str]) -> dict[str, Score]:
    """wrong: what is wrong with each caption, "" for a true one; odds (P,): the log-odds that it matches; images: whose."""
    kinds, yes = np.array(wrong), (odds >= 0).numpy()
    true = kinds == ""

    def apart(false: np.ndarray) -> Score:
        counts = np.stack([true & yes, false & ~yes, true, false], axis=1)  # (P, 4): two totals, two counts
        return Score.of(Samples.summed("macro", counts, images), 0.5)

    of_kinds = {f"matching, {kind}": apart(kinds == kind) for kind in dict.fromkeys(wrong) if kind}
    return {"matching": apart(~true), **of_kinds}


# ---- retrieval -------------------------------------------------------------------------------------------------------


def reranking(
    model, processor, pairs: Pairs, features: Tensor, *, indices: Sequence[int] | None = None, k: int = RERANK
) -> dict[str, Score]:
    """Recall@1 in both directions, by comparing alone and with the k most similar put in order by matching.

    features: of the images of `indices`, all of the split if None. Similarities are held a block at a time.
    """
    indices = range(len(pairs)) if indices is None else indices
    texts, relevant = distinct_captions(pairs, indices)
    names = [pairs.key(i) for i in indices]
    names_of_texts = [names[i] for i in first_query(relevant, len(texts))]
    tokens, mask = to_tokens(texts, processor, cut=True)
    images, vectors = encoded(model, features, tokens, mask)
    N, M = len(images), len(texts)
    to_texts, to_images = by_lists(relevant, M)
    text_alone, best = closest(vectors, images, to_images, lambda t, i: model.similarity(i, t).T, k, names_of_texts)
    of_texts = best * M + torch.arange(M)[:, None]  # a pair is image · M + text
    image_alone, best = closest(images, vectors, to_texts, model.similarity, k, names)
    of_images = torch.arange(N)[:, None] * M + best
    wanted = torch.cat([of_texts.flatten(), of_images.flatten()]).unique()  # what both ask for is matched once
    odds = match_pairs(torch.stack([wanted // M, wanted % M], dim=1), features, tokens, mask, model)
    scores = {}
    for direction, alone, asked, candidates, right, of in (
        ("text→image", text_alone, of_texts, of_texts // M, to_images, names_of_texts),
        ("image→text", image_alone, of_images, of_images % M, to_texts, names),
    ):
        matched = odds[torch.searchsorted(wanted, asked)]  # (Q, k)
        scores[f"{direction} R@1"] = alone
        scores[f"{direction} R@1 re-ranked"] = Score.of(
            Samples.mean(first_is_right(matched, candidates, right), of), alone.chance
        )
    return scores


def encoded(model, features: Tensor, tokens: Tensor, mask: Tensor, *, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """The vectors of images (N, [Q,] D), several of one with a Q-Former, and of texts (M, D). In double precision and on the
    CPU, where a tie is a tie at whatever place of a block."""
    with inference(model):
        images = each(lambda part: model.encode_image(ImageFeatures(part)), features.split(batch_size))
        parts = [*zip(tokens.split(batch_size), mask.split(batch_size), strict=True)]
        texts = each(lambda part: model.encode_text(*(x.to(model.device) for x in part)), parts)
    return torch.cat(images).cpu().double(), torch.cat(texts).cpu().double()


def closest(
    queries: Tensor,
    candidates: Tensor,
    right: Relevance,
    similarity: Callable,
    k: int,
    names: Sequence[str] | None = None,
) -> tuple[Score, Tensor]:
    """Recall@1, and the k most similar candidates of each query, (Q, k). names: of the samples, one for each query."""
    ranks, counts, best = [], [], []
    for start in range(0, len(queries), AT_A_TIME):
        rows = slice(start, start + AT_A_TIME)
        similar = similarity(queries[rows], candidates).float()  # (q, G)
        first, _, count = rank_block(similar.contiguous(), right.rows(rows))
        ranks, counts = [*ranks, first], [*counts, count]
        best.append(similar.topk(min(k, similar.shape[1]), dim=1).indices)
    return recall_at_k(torch.cat(ranks), torch.cat(counts), len(candidates), 1, names), torch.cat(best)


def first_is_right(scores: Tensor, candidates: Tensor, right: Relevance) -> list[bool]:
    """Of candidates (Q, k) with these scores: for which queries the highest one is right and alone at the top."""
    hits = []
    for start in range(0, len(candidates), AT_A_TIME):
        rows = slice(start, start + AT_A_TIME)
        is_right = right.rows(rows).gather(1, candidates[rows])
        true = scores[rows].masked_fill(~is_right, -torch.inf).amax(dim=1)
        hits += (true > scores[rows].masked_fill(is_right, -torch.inf).amax(dim=1)).tolist()
    return hits
