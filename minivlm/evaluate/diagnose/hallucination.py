"""Hallucination: a caption names, or an answer affirms, what the image does not show.

figures   CHAIR_s, the share of captions that name such an object; CHAIR_i, the share of the objects named (Rohrbach et al.
          2018, §3.2); POPE (pope.py). Lower is better for the first two and meant to be read beside what is not named.
remedies  greedy captions in place of sampled ones
          of the greedy and SAMPLES sampled captions the one that a matching model prefers (Li et al. 2021, ALBEF, §3.2)
          the one with the fewest objects that are denied when asked "is there a dog?" (grounding by questions)
          every box described alone, its surroundings painted over (grounding by regions), where there are boxes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from minivlm.datasets.class_episodes import is_class_folder
from minivlm.datasets.conversations import Conversations, has_conversations, open_conversations
from minivlm.datasets.shapes import is_world
from minivlm.evaluate.diagnose import regions
from minivlm.evaluate.diagnose.captions_sheet import draw
from minivlm.evaluate.diagnose.matcher import Judge, says_yes_and_no, yes_to
from minivlm.evaluate.diagnose.objects import HOW, Objects, objects_of
from minivlm.evaluate.diagnose.pitfall import Pitfall
from minivlm.evaluate.diagnose.pope import pope_questions, scores_by_split
from minivlm.evaluate.expectation import some_of
from minivlm.evaluate.generation import LONG
from minivlm.metrics import Score
from minivlm.metrics.chair import INSTANCE, NAMED, SENTENCE, chair_scores
from minivlm.tasks.generate import caption_all

MOST, SAMPLES = 300, 8  # images of a split, and captions of each that are sampled beside the greedy one
SPLITS = {
    "test": "",
    "unseen": "never-seen pairs, ",
}  # of the shapes world: what training never combines, its prior denies
MUCH = 0.05  # a share of captions above this is a symptom; so is a yes that is this much too frequent
SYMPTOM = (
    "a caption names, or an answer affirms, what is usual but not there. CHAIR is the share of captions (s) and of the objects "
    "named (i) that are wrong, so lower is better, as long as what is there is still named."
)
TRAINING = (
    "In training: hard negatives, captions with one word changed, which a model that matches learns to refuse "
    "(python train.py blip --data.false_captions 0.75), and which then puts the captions of another in order (--matcher)."
)


def left_out(model, processor, data, *, matcher: Judge | None = None, objects: str | None = None) -> str:
    if not model.takes_images or not ("caption" in model.abilities or says_yes_and_no(model, processor)):
        return f"a {type(model).__name__} neither describes images nor answers yes or no."
    if not has_conversations(data) and not is_class_folder(data):
        return f"{data} holds no captions, questions or classes to judge by."
    known = objects_of(data, objects)
    if known is None:
        return f"nothing says which objects the images of {data} show: {HOW}."
    if not any(Shown.of(processor, data, "test", known).there):
        return f"no caption, box or label of {data} names any of its {len(known.names)} objects: {HOW}."
    return ""


def diagnose(model, processor, data, *, matcher: Judge | None = None, objects: str | None = None) -> Pitfall:
    known = objects_of(data, objects)
    own = Judge(model, processor, "the model itself")
    judge = matcher or (own if model.abilities & {"match", "encode"} else None)
    asker = matcher if matcher and matcher.confirms_objects else own if own.confirms_objects else None
    figures, effect, images = {}, {}, []
    for split, prefix in SPLITS.items() if is_world(data) else [("test", "")]:
        shown = Shown.of(processor, data, split, known)
        found, tried = {}, {}
        if "caption" in model.abilities:
            captions = Captions.of(own, shown, judge, asker)
            found |= captions.figures()
            tried |= captions.effect()
            images.append(captions)
        if says_yes_and_no(model, processor):
            scores, better = pope(own, shown)
            found, tried = found | scores, tried | better
        figures |= {f"{prefix}{name}": score for name, score in found.items()}
        effect |= {f"{prefix}{name}": pair for name, pair in tried.items()}
    return Pitfall(
        name="hallucination",
        symptom=SYMPTOM,
        verdict=verdict(figures),
        figures=figures,
        remedy=remedy(effect, judge, asker, describes="caption" in model.abilities),
        effect=effect,
        image=draw(images[-1]) if images else None,
    )


@dataclass(frozen=True, eq=False)
class Shown:
    """Images, and the objects in each. boxes: of each image, where its objects are; none where that is not known."""

    objects: Objects
    conversations: Conversations
    indices: Sequence[int]
    there: list[set[str]]
    boxes: list[list[regions.Corners]]

    @classmethod
    def of(cls, processor, data, split: str, objects: Objects) -> Shown:
        conversations = open_conversations(data, split, image_size=processor.image_size)
        single = [i for i in range(len(conversations)) if conversations.image_count(i) == 1]
        indices = [single[i] for i in some_of(len(single), MOST)]
        there = [objects.there(conversations, i) for i in indices]
        boxes = [regions.boxes_of(conversations, i) for i in indices]
        return cls(objects, conversations, indices, there, boxes)

    @property
    def keys(self) -> list[str]:
        return [self.conversations.key(i) for i in self.indices]

    def images(self) -> list[np.ndarray]:
        return [image for [image] in self.conversations.images(self.indices)]

    def chair(self, texts: Sequence[str]) -> dict[str, Score]:
        """Of a caption for each image. Chance: what the same captions get for the next image."""
        return chair_scores([self.objects.named(text) for text in texts], self.there, self.keys)


@dataclass(frozen=True, eq=False)
class Captions:
    """Captions of every image, by what was done: the greedy ones first."""

    shown: Shown
    images: list[np.ndarray]
    by: dict[str, list[str]]

    @classmethod
    def of(cls, own: Judge, shown: Shown, judge: Judge | None, asker: Judge | None) -> Captions:
        images = shown.images()
        describe = lambda some, **how: caption_all(
            [[image] for image in some], own.model, own.processor, max_new_tokens=LONG, **how
        )
        greedy = describe(images)
        sampled = [describe(images, temperature=1.0, seed=k) for k in range(SAMPLES)]
        candidates = [list(dict.fromkeys(texts)) for texts in zip(greedy, *sampled, strict=True)]
        by = {"greedy": greedy, "sampled": sampled[0]}
        if judge is not None:
            by[f"re-ranked by {judge.how}"] = best_fitting(judge, images, candidates)
        if asker is not None:
            by["grounded by questions"] = confirmed(asker, images, candidates, shown.objects)
        if any(shown.boxes):
            alone = [(i, regions.alone(images[i], box)) for i, some in enumerate(shown.boxes) for box in some]
            texts = [[] for _ in images]
            for (i, _), text in zip(alone, describe([region for _, region in alone]), strict=True):
                texts[i].append(text)
            by["grounded by regions"] = [" and ".join(some) for some in texts]
        return cls(shown, images, by)

    def figures(self) -> dict[str, Score]:
        return self.shown.chair(self.by["greedy"])

    def effect(self) -> dict[str, tuple[Score, Score]]:
        scores = {name: self.shown.chair(texts) for name, texts in self.by.items()}
        start = {"greedy, not sampled": ("sampled", "greedy")}
        start |= {name: ("greedy", name) for name in self.by if name not in ("greedy", "sampled")}
        return {
            f"{name}: {figure}": (scores[a][figure], scores[b][figure])
            for name, (a, b) in start.items()
            for figure in (SENTENCE, INSTANCE, NAMED)
            if figure in scores[a] and figure in scores[b]
        }


def best_fitting(judge: Judge, images: Sequence[np.ndarray], candidates: Sequence[Sequence[str]]) -> list[str]:
    """Of each image the candidate that fits it best; an empty one never does."""
    pairs = [(i, text) for i, texts in enumerate(candidates) for text in texts if text.strip()]
    fits = judge.fits([images[i] for i, _ in pairs], [text for _, text in pairs])
    best: dict[int, tuple[float, str]] = {}
    for (i, text), fit in zip(pairs, fits.tolist(), strict=True):
        if i not in best or fit > best[i][0]:
            best[i] = (fit, text)
    return [best[i][1] if i in best else texts[0] for i, texts in enumerate(candidates)]


def confirmed(
    judge: Judge, images: Sequence[np.ndarray], candidates: Sequence[Sequence[str]], objects: Objects
) -> list[str]:
    """Of each image the candidate with the fewest objects that are denied, and of those with the most confirmed ones."""
    named = [[set(objects.named(text)) for text in texts] for texts in candidates]
    asked = [(i, name) for i, some in enumerate(named) for name in sorted(set(chain.from_iterable(some)))]
    yes = judge.confirms([images[i] for i, _ in asked], [name for _, name in asked], objects) if asked else []
    known = {pair for pair, said in zip(asked, yes, strict=True) if said}

    def rank(i: int, names: set[str]) -> tuple[int, int]:
        right = sum((i, name) in known for name in names)
        return len(names) - right, -right

    ranks = [[rank(i, names) for names in some] for i, some in enumerate(named)]
    return [texts[some.index(min(some))] for texts, some in zip(candidates, ranks, strict=True)]


def pope(own: Judge, shown: Shown) -> tuple[dict[str, Score], dict[str, tuple[Score, Score]]]:
    """Its scores; and what asking about every region alone does to them, where there are boxes."""
    images, asked = shown.images(), pope_questions(shown.there, shown.objects.names)
    if not asked:  # every image shows all objects
        return {}, {}
    ask = shown.objects.ask
    distinct = list(dict.fromkeys((q.image, q.name) for q in asked))

    def judged(where: Sequence[tuple[int, np.ndarray, str]]) -> dict[str, Score]:
        said = yes_to([(image, ask(name)) for _, image, name in where], own)
        yes = {(i, name) for (i, _, name), one in zip(where, said, strict=True) if one}
        return scores_by_split(asked, [(q.image, q.name) in yes for q in asked], shown.keys)

    before = judged([(i, images[i], name) for i, name in distinct])
    if not any(shown.boxes):
        return before, {}
    alone = [[regions.alone(image, box) for box in some] for image, some in zip(images, shown.boxes, strict=True)]
    after = judged([(i, region, name) for i, name in distinct for region in alone[i]])
    accuracies = [name for name in before if name.endswith(": accuracy")]
    return before, {f"regions asked about alone: {name}": (before[name], after[name]) for name in accuracies}


# ---- what is told ----------------------------------------------------------------------------------------------------


def verdict(figures: dict[str, Score]) -> str:
    told, silent = [], [score for name, score in figures.items() if name.endswith(NAMED) and score.interval[0] == 0]
    if silent:
        share = f"captions name {silent[0].value:.1%} of the objects that are there"
        return f"not found, and not to be found: {share}. If they name others, {HOW}."
    for name, score in figures.items():
        low, high = score.interval
        if name.endswith(SENTENCE) and low > MUCH:
            told.append(f"{name.removesuffix(SENTENCE)}{score.value:.0%} of captions name what is not there")
        if name.endswith(": yes") and low > 0.5 + MUCH:
            told.append(f"{name.removesuffix(': yes')}, {score.value:.0%} of answers are yes, where half should be")
        if name.endswith(": accuracy") and high < 1 - MUCH:
            told.append(f"{name.removesuffix(': accuracy')}, {score.value:.0%} of answers are right")
    if told:
        return f"found: {'; '.join(told)}."
    return "not found: hardly any caption names, and hardly any answer affirms, what is not there."


def remedy(effect: dict, judge: Judge | None, asker: Judge | None, *, describes: bool) -> str:
    tried = []
    if describes:
        tried.append("greedy captions in place of sampled ones")
        if judge:
            tried.append(f"of {SAMPLES + 1} captions the one that {judge.name} prefers by {judge.how}")
        if asker:
            tried.append(f"the one with the fewest objects that {asker.name} denies when asked for each")
    if any("regions" in name for name in effect):
        tried.append("each box alone, its surroundings painted over (the boxes are given, as a detector would)")
    told = f"tried here: {'; '.join(tried)}. " if tried else ""
    if describes and judge is None:
        told += "A model that matches could put several captions in order: --matcher MODEL. "
    return told + TRAINING
