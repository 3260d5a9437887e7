"""Questions about a scene of the shapes world, with answers that the question alone does not give away.

    what     "what is at the top left?" circle             exist    "is there a red circle?" yes
    colour   "what colour is the star?" blue               where    "where is the red circle?" top left
    count    "how many red shapes are there?" two          compare  "is the circle left of the star?" no

A blind model can learn which answer a question usually has, and often be right (Goyal et al. 2017, "Making the V in VQA
Matter"). Here no answer is usual. Most forms need no care for that: place, shape, colour and size of an object are drawn
independently and uniformly, so the answers to one text are equally frequent. Two do: "is there …?", which is asked of
what is there as often as of what is not, and "how many red shapes …?", whose usual answer would be zero.

    ask      questions for training, drawn so that the answers to each text are equally frequent
    judge    questions to judge by: each text is asked in rounds, once for each of its answers. For "where is the red
             circle?" alone a split has too few scenes; its rounds ask once for each place, whatever looks stand there.

Colours and shapes that training never combines are not asked about: "is there an orange circle?" would always be "no".
Three shapes of one colour are asked about in training, when they come, but too rare to be judged by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from minivlm.datasets.shapes import facts
from minivlm.datasets.shapes.facts import COLOUR, NUMBERS, PARTNERS, SHAPE, Fact, Objects
from minivlm.datasets.shapes.scenes import COLOURS, PLACES, SHAPES, Scene
from minivlm.datasets.shapes.text import WHERE

KINDS = ("what", "colour", "count", "exist", "where", "compare")


class Form(NamedTuple):
    """A family of questions that differ in their words alone."""

    kind: str
    share: float  # of the questions of this kind that are to be judged by
    facts: Callable[[Objects], Iterator[Fact]]
    answers: tuple[str, ...] | None  # between which a guess has to choose; None: the PARTNERS of the word
    wordings: tuple[str, ...]
    rare: bool = False  # so many texts that answers can be balanced over all of them only, not for each

    def answers_to(self, words: tuple[str, ...]) -> tuple[str, ...]:
        return self.answers or PARTNERS[words[0]]


class Asked(NamedTuple):
    text: str
    answer: str
    form: str
    words: tuple[str, ...]

    @property
    def kind(self) -> str:
        return FORMS[self.form].kind

    @property
    def chance(self) -> float:
        """The probability that a guess among the answers to this text is right."""
        return 1 / len(FORMS[self.form].answers_to(self.words))


YES_NO = ("yes", "no")
IS_THERE = ("is there {}?", "do you see {}?", "can you see {}?")
IS_IT = ("is the {} {} the {}?",)
WHERE_IS = ("where is the {}?", "where do you see the {}?")
FORMS = {
    "shape at": Form(
        "what", 1 / 2, partial(facts.at_place, answer=SHAPE), SHAPES,
        ("what is {}?", "which shape is {}?", "what shape is {}?"),
    ),
    "shape of": Form(
        "what", 1 / 2, partial(facts.of_one, named=COLOUR, answer=SHAPE), None,
        ("what shape is {}?", "which shape is the {} one?", "what is the {} shape?"),
    ),
    "colour at": Form(
        "colour", 1 / 2, partial(facts.at_place, answer=COLOUR), COLOURS,
        ("what colour is the shape {}?", "which colour is the shape {}?", "what is the colour of the shape {}?"),
    ),
    "colour of": Form(
        "colour", 1 / 2, partial(facts.of_one, named=SHAPE, answer=COLOUR), None,
        ("what colour is the {}?", "which colour is the {}?", "what colour does the {} have?"),
    ),
    "count all": Form(
        "count", 1 / 3, facts.count_all, NUMBERS[1:],
        ("how many shapes are there?", "how many shapes do you see?", "how many shapes are in the picture?"),
    ),
    "count colour": Form(
        "count", 1 / 3, partial(facts.count_each, attribute=COLOUR), NUMBERS[:3],
        ("how many {} shapes are there?", "how many shapes are {}?", "how many {} shapes do you see?"),
    ),
    "count shape": Form(
        "count", 1 / 3, partial(facts.count_each, attribute=SHAPE), NUMBERS[:3],
        ("how many {} are there?", "how many shapes are {}?", "how many {} do you see?"),
    ),
    "exist near": Form("exist", 3 / 4, partial(facts.exists, near=True), YES_NO, IS_THERE),
    "exist far": Form("exist", 1 / 4, partial(facts.exists, near=False), YES_NO, IS_THERE),
    "place": Form("where", 1 / 3, facts.places, PLACES, WHERE_IS, rare=True),
    "place of shape": Form("where", 1 / 3, partial(facts.places_of_one, named=SHAPE), PLACES, WHERE_IS),
    "place of colour": Form("where", 1 / 3, partial(facts.places_of_one, named=COLOUR), PLACES, WHERE_IS),
    "size": Form("compare", 1 / 3, partial(facts.compared, relations=facts.sizes), YES_NO, IS_IT),
    "side": Form("compare", 1 / 3, partial(facts.compared, relations=facts.sides), YES_NO, IS_IT),
    "more": Form("compare", 1 / 3, facts.more, YES_NO, ("are there more {} than {}?",)),
}  # fmt: skip

PHRASES = WHERE | {  # the two phrases for a word, where there are two
    "larger than": ("larger than", "bigger than"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}


def phrase(form: str, words: Sequence[str], variation: int = 0) -> str:
    """The text of a question; `variation` counts through its wordings, and then again with the other phrases."""
    phrasing, wording = divmod(variation, len(FORMS[form].wordings))
    phrases = [PHRASES[word][phrasing % 2] if word in PHRASES else word for word in words]
    return FORMS[form].wordings[wording % len(FORMS[form].wordings)].format(*phrases)


def variations(form: str) -> int:
    return 2 * len(FORMS[form].wordings)


def true_questions(scene: Scene) -> list[Asked]:
    """Everything that can be asked about a scene, in every wording."""
    return [
        Asked(text, fact.answer, name, fact.words)
        for name, form in FORMS.items()
        for fact in form.facts(scene.objects)
        for text in dict.fromkeys(phrase(name, fact.words, i) for i in range(variations(name)))
    ]


# ---- questions for training ------------------------------------------------------------------------------------------

# Of every slot one form is asked, chosen independently of the scene: an answer must not depend on what else could have
# been asked. What is missing to 1 asks nothing; neither does a form for which the scene has no facts.
COUNT_SLOTS = ({"count all": 0.35}, {"count colour": 1.0}, {"count shape": 1.0})
OTHER_SLOTS = (
    {"shape at": 0.5, "shape of": 0.5},
    {"colour at": 0.5, "colour of": 0.5},
    {"exist near": 0.75, "exist far": 0.25},
    {"place": 0.5, "place of shape": 0.25, "place of colour": 0.25},
    {"size": 0.9},
    {"side": 0.5},
    {"more": 0.35},
)
TURNS = 6  # questions about one image, at most
# A scene that is described in words gets more questions, and most of them compare two objects: that is learned last, since
# both have to be found before a "yes" means anything. Two of the slots may ask the same.
DESCRIBED_SLOTS = (*OTHER_SLOTS[:-3], {"size": 1.0}, {"side": 1.0}, {"more": 1.0}, {"size": 0.5, "side": 0.5})
DESCRIBED_TURNS = 8


def ask(
    scene: Scene,
    rng: np.random.Generator,
    *,
    slots: Sequence[dict[str, float]] = OTHER_SLOTS,
    turns: int = TURNS,
) -> list[Asked]:
    """Up to `turns` questions in random order, how many things there are and one for each of the slots; by default, all
    kinds are equally frequent over many scenes.

    Of `rng` only the raw stream of its bit generator is used, which NumPy keeps the same from version to version.
    """
    n = len(COUNT_SLOTS) + len(slots)
    draws = (rng.bit_generator.random_raw(5 * n) >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
    forms, facts, wordings, order, when = draws.reshape(5, n).tolist()
    others = [slots[i] for _, i in sorted((order[i], i) for i in range(len(slots)))]
    asked = []
    # Counting comes first: if it could fall away, scenes with much to ask would be asked for "two" less often.
    for slot, form, fact, wording in zip((*COUNT_SLOTS, *others), forms, facts, wordings, strict=True):
        name = choose(slot, form)
        if name and len(asked) < turns and (found := choose_fact(name, scene, fact)):
            text = phrase(name, found.words, int(wording * variations(name)))
            asked.append(Asked(text, found.answer, name, found.words))
    return [question for _, question in sorted(zip(when, asked, strict=False))]


def choose(shares: dict, draw: float):
    """One of the keys, each with the probability of its value; None with the probability that remains."""
    for name, share in shares.items():
        if draw < share:
            return name
        draw -= share
    return None


def choose_fact(name: str, scene: Scene, draw: float) -> Fact | None:
    """One fact, or none where the answer that is wanted is not true of anything."""
    facts = list(FORMS[name].facts(scene.objects))
    if name in BALANCED:
        answers = choose(BALANCED[name](facts), draw) or ()
        facts = [fact for fact in facts if fact.answer in answers]
    return facts[int(draw * 2**40) % len(facts)] if facts else None


def count_shares(repeated: float = 0.6) -> tuple[dict, dict]:
    """How often scenes with and without a repeated colour are asked for which number, so that "zero", "one" and "two"
    are equally frequent answers to "how many red shapes are there?". Shapes repeat as often as colours.

    One to three objects are equally likely, each of one of eight colours: two agree in 1/8 of the scenes with two, and in
    21/64 of those with three (then the third is alone); three agree in 1/64. Only where two agree can "two" be asked for.
    Let that be done in the share `repeated` of these scenes, and let what remains go to "zero" and "one" in halves, so
    that the answer is not always "two" there. All other scenes then have to be asked as rarely as follows.
    """
    two, two_of_three, three = (1 / 8 + 21 / 64) / 3, 21 / 64 / 3, 1 / 64 / 3
    wanted, rest, plain = repeated * two, (1 - repeated) / 2, 1 - two - three
    zero, one = (wanted - rest * (two + three)) / plain, (wanted - rest * two_of_three) / plain
    return {("two", "three"): repeated, ("zero",): rest, ("one",): rest}, {("zero",): zero, ("one",): one}


REPEATED, PLAIN = count_shares()


def number_shares(facts: list[Fact]) -> dict[tuple[str, ...], float]:
    return REPEATED if any(fact.answer in ("two", "three") for fact in facts) else PLAIN


def yes_no_shares(facts: list[Fact]) -> dict[tuple[str, ...], float]:
    return {("yes",): 0.5, ("no",): 0.5}


BALANCED = {  # forms of which the answer is chosen before the fact
    "count colour": number_shares,
    "count shape": number_shares,
    "exist near": yes_no_shares,
    "exist far": yes_no_shares,
}


# ---- questions to judge by -------------------------------------------------------------------------------------------

Cases = dict[tuple[str, ...], dict[str, list[tuple[int, Fact]]]]  # words → answer → the scenes where it is true


def judge(
    scenes: Sequence[Scene], n: int, *, seed: int = 0, wanted: Callable[[Fact], bool] | None = None
) -> list[tuple[int, Asked]]:
    """About `n` questions of every kind, each with the index of its scene; of the facts, only those that are wanted.

    Asked in rounds: one text (of a rare form: one wording) once for each of its answers, never twice about one fact. All
    texts are asked equally often, as far as the scenes suffice; where they do not, there are fewer questions.
    """
    rng = np.random.default_rng(seed)
    cases = {name: collect(scenes, name, wanted, rng) for name in FORMS}
    questions = []
    for name, form in FORMS.items():
        if cases[name]:
            of_kind = sum(FORMS[other].share for other in FORMS if cases[other] and FORMS[other].kind == form.kind)
            questions += rounds(name, cases[name], round(n * form.share / of_kind), rng)
    return questions


def collect(scenes: Sequence[Scene], name: str, wanted: Callable | None, rng: np.random.Generator) -> Cases:
    form, cases = FORMS[name], defaultdict(lambda: defaultdict(list))
    for i in rng.permutation(len(scenes)).tolist():
        for fact in form.facts(scenes[i].objects):
            if wanted is None or wanted(fact):
                cases[() if form.rare else fact.words][fact.answer].append((i, fact))
    return cases


def rounds(name: str, cases: Cases, most: int, rng: np.random.Generator) -> list[tuple[int, Asked]]:
    """At most `most` questions of one form, in whole rounds."""
    order = [sorted(cases)[i] for i in rng.permutation(len(cases))]
    answers = {words: FORMS[name].answers_to(words) for words in order}
    full = {words: min(len(cases[words][answer]) for answer in answers[words]) for words in order}  # rounds to be had
    questions = []
    for turn in range(max(full.values())):
        for k, words in enumerate(order):
            if turn < full[words]:
                if len(questions) + len(answers[words]) > most:
                    return questions
                for i, fact in (cases[words][answer][turn] for answer in answers[words]):
                    text = phrase(name, fact.words, (turn + k) % variations(name))
                    questions.append((i, Asked(text, fact.answer, name, fact.words)))
    return questions
