"""CapFilt: a BLIP that was trained on the web's captions proposes captions of its own, throws out those that do not match
their pictures, of both kinds, and a new BLIP is trained on what is left.

    blip-noisy ─┬─ captioner ─→ a proposal for every picture ─┐
                └─ filter ─────→ the web's caption? the proposal? ─→ cleaner pairs ─→ blip-capfilt

Li et al. 2022, "BLIP", §3.3 and figure 3. There, captioner and filter are fine-tuned on captions that people wrote; here,
nothing but the noisy captions is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minivlm.checkpoint import load
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld
from minivlm.datasets.shapes.negatives import is_true
from minivlm.errors import UserError
from minivlm.metrics import Samples, Score
from minivlm.models.blip import BLIP
from minivlm.pictures import Row, sheet, wrap
from minivlm.processor import Processor
from minivlm.recipes.blip import BLIP_RECIPES, BLIPRecipe, MatchingAndCaptions, check_queue, job, open_parts
from minivlm.recipes.folders import check_fills_a_batch
from minivlm.recipes.job import Job
from minivlm.recipes.recipe import FolderData
from minivlm.recipes.vision_cache import ROOM, Room, VisionCache
from minivlm.tasks.features import to_tokens
from minivlm.tasks.generate import caption_all
from minivlm.tasks.match import features_of_all, match_pairs
from minivlm.training import autocast

AT_A_TIME = 256  # images
PICTURED, TILE = 4, 176  # pairs of a kind on the sheet, and their pixels
WEB, PROPOSED = "the web's captions", "proposed captions"
LIKE_THE_TEACHER = ("optimiser", "steps", "batch_size", "save_every")


@dataclass(frozen=True, kw_only=True)
class FilteredData(FolderData):
    vocab_size: int = 512  # of the byte-level BPE that is trained on captions and questions
    wrong_captions: float = 0.4  # share of the captions that are another picture's, before the filter
    false_captions: float = 0.75  # share of the samples that come with a nearly right caption, where there is one
    proposed: int | None = None  # of the training images, the first so many; None: all
    top_p: float | None = 0.9  # proposals are sampled (nucleus: §4.2, the more diverse the better); None: the likeliest
    # Pairs that match less probably are thrown out. A filter that learnt from noise finds a wrong caption as probable as it
    # has met wrong ones, here 0.4: of the first 2,560 pictures' captions, 0.5 keeps 95 % true ones and 0.6 only true ones.
    threshold: float = 0.6


@dataclass(frozen=True, kw_only=True)
class CapFiltRecipe(BLIPRecipe):
    starts_from: str = "out/blip-noisy"  # captioner and filter
    data: FilteredData = FilteredData()

    def builds_on(self) -> dict[str, str]:
        return {**super().builds_on(), "starts_from": "blip-noisy"}

    def start(self, checkpoint: Path | None = None, *, quiet: bool = False) -> Job:
        check_queue(self)
        teacher, reads = load(self.starts_from)
        if not isinstance(teacher, BLIP) or teacher.config.roles != "all":
            raise UserError(
                f"--starts_from {self.starts_from} holds a {type(teacher).__name__}, but a BLIP that captions and matches "
                "is wanted: train one with `python train.py blip-noisy`."
            )
        model, processor, web = open_parts(self, checkpoint, quiet=quiet)
        made = job(self, model, processor, web, ask=False)
        made.scores = scores = Filtered(made.scores, web)
        teachers = [(teacher, reads)]

        def prepare(device: torch.device, precision: torch.dtype, room: Room = ROOM) -> None:
            """Propose and judge. What results is a function of the recipe, so a run that is resumed does it again."""
            teacher, reads = teachers.pop()  # whose memory is wanted
            with autocast(device, precision):
                scores.judged = bootstrap(self, teacher.to(device), reads, web)
            made.samples.pairs = kept = Bootstrapped(web, scores.judged)
            check_kept(self, kept, scores.judged)
            made.samples.images = cache = VisionCache(model, processor, len(kept), kept.images)
            cache.prepare(device, precision, room)

        made.prepare = prepare
        return made


@dataclass
class Judged:
    """Captions of one origin: the i-th belongs to picture i."""

    origin: str
    captions: list[str]
    probability: np.ndarray  # that it matches
    kept: np.ndarray  # bool
    true: np.ndarray | None  # bool; None where nobody knows

    def scores(self) -> dict[str, Score]:
        """Of the filter: how many of those kept are true, and how many of the true ones are kept. Chance: keep all, or as
        many at random."""
        kept, true = self.kept, self.true
        precision, recall = (Samples("ratio", np.stack([kept & true, of], axis=1)) for of in (kept, true))
        return {
            f"filter, {self.origin}, precision": Score.of(precision, float(true.mean())),
            f"filter, {self.origin}, recall": Score.of(recall, float(kept.mean())),
        }


class Bootstrapped(Pairs):
    """The pairs that were kept: some pictures come with two captions, as two pairs, some not at all."""

    split = "train"

    def __init__(self, pairs: Pairs, judged: Sequence[Judged]):
        self.pairs = pairs
        self.kept = [(int(i), some.captions[i]) for some in judged for i in np.flatnonzero(some.kept)]

    def __len__(self) -> int:
        return len(self.kept)

    def images(self, indices: Sequence[int]) -> list[np.ndarray]:
        return self.pairs.images([self.kept[i][0] for i in indices])

    def all_captions(self, index: int) -> list[str]:
        return [self.kept[index][1]]

    def key(self, index: int) -> str:
        return self.pairs.key(self.kept[index][0])


def check_kept(recipe: CapFiltRecipe, kept: Bootstrapped, judged: Sequence[Judged]) -> None:
    """UserError unless what is left fills a batch."""
    if not len(kept):
        likeliest = max(some.probability.max() for some in judged)
        raise UserError(
            f"the filter drops every caption: none matches with a probability of {recipe.data.threshold:g} (the "
            f"likeliest has {likeliest:.3f}); lower --data.threshold, or train {recipe.starts_from} for longer."
        )
    check_fills_a_batch(len(kept), recipe.batch_size, "pairs that the filter kept", recipe.data.source)


class Filtered:
    """The scores of a BLIP, and those of the filter; judged: once it has."""

    def __init__(self, scores: MatchingAndCaptions, web: Pairs):
        self.scores, self.web = scores, web
        self.name, self.validate, self.next_commands = scores.name, scores.validate, scores.next_commands
        self.judged: list[Judged] = []

    def evaluate(self) -> dict[str, Score]:
        """And how many of the pairs that were learnt from are true; chance: of the web's."""
        scores = self.scores.evaluate()
        if any(some.true is None for some in self.judged):
            return scores
        for some in self.judged:
            scores |= some.scores()
        kept = np.concatenate([some.true[some.kept] for some in self.judged])
        chance = float(self.judged[0].true.mean())
        return scores | {"pairs learnt from that are true": Score.of(Samples.mean(kept), chance)}

    def figure(self, path: Path) -> None:
        """Pairs that were kept, and such that were dropped; framed green where that was right."""
        rows = []
        for some in self.judged:
            for kept, name in ((True, "kept"), (False, "dropped")):
                chosen = np.flatnonzero(some.kept == kept)
                chosen = chosen[:: max(1, len(chosen) // PICTURED)][:PICTURED].tolist()
                marks = [None if some.true is None else bool(some.true[i]) == kept for i in chosen]
                texts = [f"{some.probability[i]:.0%} {some.captions[i]}" for i in chosen]
                notes = ["\n".join(wrap(text, 13, TILE)) for text in texts]
                rows.append(Row(f"{some.origin}: {name}", list(self.web.images(chosen)), marks, notes))
        title = "What the filter kept and dropped, with how probably it matches"
        sheet([row for row in rows if row.images], title=title, tile=TILE, columns=PICTURED).save(path)


def bootstrap(recipe: CapFiltRecipe, model: BLIP, processor: Processor, web: Pairs) -> list[Judged]:
    """The web's captions and the captioner's, each judged by the filter."""
    from tqdm import tqdm

    n = len(web) if recipe.data.proposed is None else min(recipe.data.proposed, len(web))
    how = {} if recipe.data.top_p is None else dict(temperature=1.0, top_p=recipe.data.top_p)
    captions, odds = {WEB: [web.all_captions(i)[0] for i in range(n)], PROPOSED: []}, {WEB: [], PROPOSED: []}
    for start in tqdm(range(0, n, AT_A_TIME), desc="captions proposed and judged", unit=" batches", leave=False):
        pictures = list(web.images(range(start, min(start + AT_A_TIME, n))))
        seed = recipe.seed + start
        captions[PROPOSED] += caption_all(
            [[p] for p in pictures], model, processor, batch_size=AT_A_TIME, seed=seed, **how
        )
        features = features_of_all(pictures, model, processor, batch_size=AT_A_TIME)
        pairs = torch.arange(len(pictures))[:, None].expand(-1, 2)
        for origin, some in captions.items():
            words = to_tokens(some[start : start + AT_A_TIME], processor, cut=True)
            odds[origin] += match_pairs(pairs, features, *words, model, batch_size=AT_A_TIME).sigmoid().tolist()
    return [judge(recipe, web, origin, captions[origin], np.array(odds[origin])) for origin in captions]


def judge(recipe: CapFiltRecipe, web: Pairs, origin: str, captions: list[str], probability: np.ndarray) -> Judged:
    """Keep what matches; and say what is true, where the world is known."""
    world = getattr(web, "pairs", web)
    true = None
    if isinstance(world, ShapesWorld):
        scenes = world.scenes.read(np.arange(len(captions)))
        true = np.array([is_true(text, scene) for text, scene in zip(captions, scenes, strict=True)])
    return Judged(origin, captions, probability, probability >= recipe.data.threshold, true)


CAPFILT_RECIPES = {
    "blip-capfilt": CapFiltRecipe(
        summary="CapFilt: a BLIP trained on what the captioner proposes and the filter keeps of noisy captions",
        measured="16 to 18 min on one busy core: matching 93 %, 74 % of scenes described (3 seeds, before smoothing)",
        **{name: getattr(BLIP_RECIPES["blip-noisy"], name) for name in LIKE_THE_TEACHER},
    ),
}
