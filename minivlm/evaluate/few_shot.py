"""Few-shot accuracy on new words, which nothing but the prompt explains, over the number of examples.

    2 shots                        of an episode's words, is the right one the likeliest behind "this is a"?
    2 shots, labels shuffled       the same with each word of the examples in the place of another
    2 shots, shuffled label said   … is that word chosen instead? A model that uses the examples does so
    2 shots, pictures shuffled     the examples' images in random order: a model that uses them is left with chance
    2 shots, never-seen pairs      of shapes in colours that never occurred together in training
    2 shots, told in words         the language model alone, with descriptions in place of images: an upper bound, nearly

Min et al. 2022, "Rethinking the Role of Demonstrations", on why labels are to be shuffled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minivlm.datasets.class_episodes import class_episodes
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.episodes import new_words
from minivlm.datasets.shapes.shots import ShotEpisode, shot_episodes
from minivlm.errors import UserError
from minivlm.evaluate.language import new_words as new_words_in_text
from minivlm.metrics import Samples, Score
from minivlm.pictures import chart
from minivlm.tasks.abilities import require_answers
from minivlm.tasks.few_shot import LEAD, Example, check_room, few_shot_prompt, likeliest

SHOTS = (0, 1, 2, 4, 8)  # examples in all
EPISODES = 300


def few_shot(
    model, processor, directory: str | Path, *, shots: Sequence[int] = SHOTS, ways: int = 2
) -> dict[str, Score]:
    """All scores on the shapes world's held-out episodes, or on those of a folder of classes (class_episodes.py).

    UserError: a model that learns from no examples, fewer than two ways, examples that do not fit its context.
    """
    require_answers(model, processor, images=1, ability="few-shot")
    if ways < 2:
        raise UserError(f"--ways is {ways}, but to choose from one word is no choice: at least two are needed.")
    scores, size = {}, processor.image_size
    for k in shots:
        episodes = draw_episodes(directory, shots=k, ways=ways, image_size=size)
        name = f"{k} shot{'s' * (k != 1)}"
        scores |= {f"{name}{key}": score for key, score in judge(model, processor, episodes, ways).items()}
        if is_world(directory):
            unseen = draw_episodes(directory, shots=k, ways=ways, image_size=size, looks="unseen")
            scores[f"{name}, never-seen pairs"] = few_shot_accuracy(model, processor, unseen, ways=ways)
        if is_world(directory) and k and k % ways == 0:
            described = new_words_in_text(model.language_model, processor, k // ways, ways=ways)
            scores[f"{name}, told in words"] = described
    return scores


def few_shot_picture(scores: dict[str, Score], path: Path) -> None:
    """What `few_shot` gives as curves over the number of examples."""
    lines = few_shot_lines(scores)
    chance = next(iter(scores.values())).chance
    chart(lines, title="New words from examples in the prompt", across="examples", chance=chance).save(path)


def few_shot_lines(scores: Mapping[str, Score]) -> dict[str, dict[int, float]]:
    """What is measured → number of examples → value. Other scores are passed over."""
    lines: dict[str, dict[int, float]] = {}
    for name, score in scores.items():
        if found := re.fullmatch(r"(\d+) shots?(?:, (.+))?", name):
            lines.setdefault(found[2] or "accuracy", {})[int(found[1])] = score.value
    return lines


def draw_episodes(
    directory: str | Path, *, shots: int, ways: int, image_size: int, looks: str = "seen"
) -> list[ShotEpisode]:
    if not is_world(directory):
        return class_episodes(directory, EPISODES, shots=shots, ways=ways)
    try:
        return shot_episodes(EPISODES, shots=shots, ways=ways, looks=looks, image_size=image_size)
    except ValueError as error:
        raise UserError(f"--shots {shots} --ways {ways}: {error}.") from None


def judge(model, processor, episodes: Sequence[ShotEpisode], ways: int) -> dict[str, Score]:
    """Accuracy, and the same of episodes that were tampered with, where they have enough examples for that."""
    scores = {"": few_shot_accuracy(model, processor, episodes, ways=ways)}
    k = len(episodes[0].examples)
    if k >= 1:
        words = all_choices(episodes, ways)
        others = [dict(zip(some, some[1:] + some[:1], strict=True)) for some in words]
        changed = [shuffle_labels(episode, other) for episode, other in zip(episodes, others, strict=True)]
        chosen = name_queries(model, processor, changed, words)
        true = [episode.query.label for episode in episodes]
        scores[", labels shuffled"] = agreement(chosen, true, ways)
        new = [other[label] for other, label in zip(others, true, strict=True)]
        scores[", shuffled label said"] = agreement(chosen, new, ways)
    if k >= 2:
        shown = [shuffle_images(episode, np.random.default_rng(i)) for i, episode in enumerate(episodes)]
        scores[", pictures shuffled"] = few_shot_accuracy(model, processor, shown, ways=ways)
    return scores


def few_shot_accuracy(model, processor, episodes: Sequence[ShotEpisode], *, ways: int = 2) -> Score:
    """How many queries are given their own word, of the `ways` there are."""
    chosen = name_queries(model, processor, episodes, all_choices(episodes, ways))
    return agreement(chosen, [episode.query.label for episode in episodes], ways)


def agreement(chosen: Sequence[str], right: Sequence[str], ways: int) -> Score:
    return Score.of(Samples.mean([a == b for a, b in zip(chosen, right, strict=True)]), 1 / ways)


def name_queries(model, processor, episodes: Sequence[ShotEpisode], words: Sequence[Sequence[str]]) -> list[str]:
    """The likeliest of its words for each episode's query."""
    prompts = []
    for episode, some in zip(episodes, words, strict=True):
        examples = [Example(image, f"{LEAD} {label}") for image, label in episode.examples]
        asked = Example(episode.query.image, LEAD)
        prompts.append(few_shot_prompt(examples, asked, processor))
        check_room(examples, asked, some, model, processor)
    return likeliest(model, processor, prompts, words)


def all_choices(episodes: Sequence[ShotEpisode], ways: int) -> list[list[str]]:
    return [choices(episode, ways, np.random.default_rng(i)) for i, episode in enumerate(episodes)]


def choices(episode: ShotEpisode, ways: int, rng: np.random.Generator) -> list[str]:
    """The words to choose from: those of the episode, and new ones where its examples show fewer; in any order."""
    known = dict.fromkeys([*(shot.label for shot in episode.examples), episode.query.label])
    while len(known) < ways:
        known |= dict.fromkeys(new_words(rng, ways - len(known), held_out=True))
    return [list(known)[i] for i in rng.permutation(len(known))]


def shuffle_labels(episode: ShotEpisode, other: dict[str, str]) -> ShotEpisode:
    """Each word of the examples becomes another one; examples of one word still share one."""
    return episode._replace(examples=[shot._replace(label=other[shot.label]) for shot in episode.examples])


def shuffle_images(episode: ShotEpisode, rng: np.random.Generator) -> ShotEpisode:
    """The examples' images in random order, their labels where they were."""
    examples = episode.examples
    order = rng.permutation(len(examples))
    return episode._replace(
        examples=[shot._replace(image=examples[i].image) for shot, i in zip(examples, order, strict=True)]
    )
