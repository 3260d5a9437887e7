"""Questions about the shapes world are true, unambiguous, short, and worth nothing without the picture."""

import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from minivlm.datasets.shapes import split_scenes
from minivlm.datasets.shapes.facts import PARTNERS, UNSEEN_PAIRS, about_unseen
from minivlm.datasets.shapes.questions import (
    DESCRIBED_SLOTS,
    DESCRIBED_TURNS,
    FORMS,
    KINDS,
    TURNS,
    ask,
    count_shares,
    judge,
    phrase,
    true_questions,
    variations,
)
from minivlm.datasets.shapes.scenes import COLOURS, PLACES, SHAPES, Scene, SceneObject

CIRCLE = SceneObject("circle", "red", "small", "top left")
STAR = SceneObject("star", "blue", "large", "right")
NUMBERS = ("zero", "one", "two", "three")


@pytest.fixture(scope="module")
def train():
    return split_scenes("train", seed=0, train=20_000).read(np.arange(20_000))


@pytest.fixture(scope="module")
def test():
    return split_scenes("test", seed=0, train=1).read(np.arange(500))


@pytest.fixture(scope="module")
def unseen():
    return split_scenes("unseen", seed=0, train=1).read(np.arange(500))


@pytest.fixture(scope="module")
def asked(train):
    rng = np.random.default_rng(0)
    return [ask(scene, rng) for scene in train]


@pytest.fixture(scope="module")
def told(train):
    """What is asked about a scene that is told in words."""
    rng = np.random.default_rng(0)
    return [ask(scene, rng, slots=DESCRIBED_SLOTS, turns=DESCRIBED_TURNS) for scene in train]


# ---- truth: a reader of questions that shares no code with their writer ----------------------------------------------

PLACE_WORDS = {"middle": "centre"}
COLOUR_WORD, SHAPE_WORD = "|".join(COLOURS), "|".join(SHAPES)


def meant(phrase, scene):
    """The objects that "the red circles", "a star" or "green shape" can mean."""
    phrase = phrase.replace("crosses", "cross")
    colour = re.search(rf"\b({COLOUR_WORD})\b", phrase)
    shape = re.search(rf"\b({SHAPE_WORD})", phrase)
    assert colour or shape or "shape" in phrase, phrase
    return [o for o in scene.objects if (not colour or o.colour == colour[1]) and (not shape or o.shape == shape[1])]


def the(phrase, scene):
    (only,) = meant(phrase, scene)  # or the question is ambiguous
    return only


def at(phrase, scene):
    name = re.search(r"(?:at|in|on|near) the (.*?)(?: side| corner)?\?", phrase)[1]
    (only,) = (o for o in scene.objects if o.place == PLACE_WORDS.get(name, name))
    return only


def related(a, relation, b):
    sizes, rows = ("small", "large"), {o: divmod(PLACES.index(o.place), 3) for o in (a, b)}
    difference = {
        "larger": sizes.index(a.size) - sizes.index(b.size),
        "right": rows[a][1] - rows[b][1],
        "below": rows[a][0] - rows[b][0],
    }
    difference |= {"bigger": difference["larger"], "smaller": -difference["larger"], "left": -difference["right"]}
    difference |= {"above": -difference["below"], "higher": -difference["below"], "lower": difference["below"]}
    assert difference[relation] != 0, "neither clearly true nor clearly false"
    return difference[relation] > 0


def truth(text, scene):
    yes_no = {True: "yes", False: "no"}
    if found := re.match(r"how many (.*?)(?: are there| do you see| are in the picture)?\?$", text):
        return NUMBERS[len(meant(found[1], scene))]
    if found := re.match(r"(?:is there|do you see|can you see) (an? .*)\?$", text):
        assert found[1].startswith("an ") == (found[1].split()[1][0] in "aeiou")
        return yes_no[bool(meant(found[1], scene))]
    if found := re.match(r"where (?:is|do you see) the (.*)\?$", text):
        return the(found[1], scene).place
    if found := re.match(r"are there more (.*) than (.*)\?$", text):
        a, b = (len(meant(part, scene)) for part in found.groups())
        assert a != b
        return yes_no[a > b]
    if found := re.match(
        r"is the (.*?) (?:to the )?(larger|bigger|smaller|left|right|above|below|higher|lower)(.*)\?$", text
    ):
        return yes_no[related(the(found[1], scene), found[2], the(found[3], scene))]
    colour, shape = "colour" in text.split()[:4], text.split()[1] in ("is", "shape")
    thing = at(text, scene) if re.search(r"(?:at|in|on|near) the ", text) else the(text, scene)
    assert colour or shape
    return thing.colour if colour else thing.shape


def test_every_question_is_true_unambiguous_short_and_in_lower_case(train, unseen):
    seen = set()
    for scene in [*train[:150], *unseen[:50]]:
        for question in true_questions(scene):
            assert truth(question.text, scene) == question.answer, (question, scene)
            assert question.text == question.text.lower() and len(question.text.split()) <= 12
            seen.add((question.form, question.kind))
    assert seen == {(name, form.kind) for name, form in FORMS.items()}
    assert {kind for _, kind in seen} == set(KINDS)


def test_one_object_and_all_that_can_be_asked_about_it():
    asked = defaultdict(set)
    for question in true_questions(Scene((CIRCLE,))):
        asked[question.kind, question.answer].add(question.text)
    assert asked["what", "circle"] == {
        *(f"{what} {where}?" for what in ("what is", "which shape is", "what shape is") for where in ("at the top left", "in the top left corner")),
        *("what shape is red?", "which shape is the red one?", "what is the red shape?"),
    }  # fmt: skip
    assert "what colour is the shape at the top left?" in asked["colour", "red"]
    assert "what colour is the circle?" in asked["colour", "red"]
    assert asked["count", "one"] >= {
        "how many shapes are there?",
        "how many red shapes are there?",
        "how many circles are there?",
    }
    assert asked["count", "zero"] >= {"how many blue shapes are there?", "how many crosses are there?"}
    assert asked["exist", "yes"] == {"is there a red circle?", "do you see a red circle?", "can you see a red circle?"}
    assert "is there a red star?" in asked["exist", "no"] and "is there an orange circle?" not in asked["exist", "no"]
    assert "where is the red circle?" in asked["where", "top left"]
    assert asked["compare", "yes"] >= {
        "are there more circles than stars?",
        "are there more red shapes than blue shapes?",
    }
    assert not {"what", "colour", "where"} & {
        kind for kind, answer in asked if asked[kind, answer] and answer in ("yes", "no")
    }


def test_what_two_objects_share_does_not_name_either():
    twins = Scene((CIRCLE, CIRCLE._replace(place="right", size="large"), STAR))
    texts = {question.text: question.answer for question in true_questions(twins)}
    assert texts["how many red shapes are there?"] == texts["how many circles are there?"] == "two"
    assert texts["is there a red circle?"] == "yes" and texts["are there more circles than stars?"] == "yes"
    for text in (
        "where is the red circle?",
        "where is the circle?",
        "what colour is the circle?",
        "what shape is red?",
    ):
        assert text not in texts
    assert not any(text.startswith("is the ") for text in texts)  # only the star could be named


def test_sizes_and_sides_are_compared_only_where_they_differ():
    texts = [
        question.text for question in true_questions(Scene((CIRCLE, STAR._replace(place="bottom left", size="small"))))
    ]
    assert not any(re.search("larger|bigger|smaller|left of|right of", text) for text in texts)
    assert "is the circle above the star?" in texts and "is the blue shape lower than the red shape?" in texts


# ---- questions for training ------------------------------------------------------------------------------------------


def test_all_kinds_are_equally_frequent_and_nothing_is_asked_twice(asked):
    counts = Counter(question.kind for questions in asked for question in questions)
    for kind in KINDS:
        assert abs(counts[kind] / counts.total() - 1 / 6) < 0.012, (kind, counts)
    lengths = [len(questions) for questions in asked]
    assert min(lengths) >= 1 and max(lengths) == TURNS == 6 and np.mean(lengths) > 5
    assert all(len({question.text for question in questions}) >= len(questions) for questions in asked[:2000])


def test_of_told_scenes_more_is_asked_and_comparing_most_of_all(told):
    counts = Counter(question.kind for questions in told for question in questions)
    shares = {kind: counts[kind] / counts.total() for kind in KINDS}
    assert shares.pop("compare") > 0.3 and all(0.1 < share < 0.2 for share in shares.values())
    lengths = [len(questions) for questions in told]
    assert min(lengths) >= 1 and max(lengths) == DESCRIBED_TURNS == 8 and np.mean(lengths) > 6.5


@pytest.mark.parametrize("which", ["asked", "told"])
def test_what_training_asks_is_true(which, train, request):
    for scene, questions in zip(train[:3000], request.getfixturevalue(which), strict=False):
        for question in questions:
            assert truth(question.text, scene) == question.answer


@pytest.mark.parametrize("which", ["asked", "told"])
def test_answers_to_a_form_are_equally_frequent_in_training(which, request):
    """And so, by symmetry of places, colours and shapes, to each text."""
    forms = defaultdict(Counter)
    for question in (question for questions in request.getfixturevalue(which) for question in questions):
        forms[question.form][question.answer] += 1
    for name, counts in forms.items():
        if name in ("count colour", "count shape"):
            assert counts.pop("three") < 0.02 * counts.total()  # as they come: too rare to be made frequent
        assert len(counts) == len(FORMS[name].answers or SHAPES)
        share = 1 / len(counts)
        spread = (share * (1 - share) / counts.total()) ** 0.5
        for answer, n in counts.items():
            assert abs(n / counts.total() - share) < 4.5 * spread, (name, answer, counts)


def test_answers_to_one_text_are_equally_frequent_in_training(train):
    """The two forms that need care, drawn often, text by text."""
    rng = np.random.default_rng(1)
    texts = defaultdict(Counter)
    for scene in train:
        for question in ask(scene, rng):
            if question.form.startswith(("count", "exist")):
                texts[question.form.split()[0], question.words][question.answer] += 1
    assert len(texts) == 1 + 16 + 56
    for (form, words), counts in texts.items():
        del counts["three" if words else None]
        shares = np.array(list(counts.values())) / counts.total()
        chance = 1 / len(shares)
        assert len(shares) == (3 if form == "count" else 2)
        assert abs(shares - chance).max() < 4.5 * (chance * (1 - chance) / counts.total()) ** 0.5, (words, counts)


def test_the_shares_of_numbers_add_up_over_scenes(train):
    """The formula against the scenes it is about: every answer is asked for in the same share of them."""
    repeated, plain = count_shares()
    wanted = Counter()
    for scene in train:
        counts = Counter(thing.colour for thing in scene.objects).values()
        shares = repeated if max(counts) > 1 else plain
        true = {"zero", *(NUMBERS[n] for n in counts)}
        for answers, share in shares.items():
            wanted[answers[0]] += share * bool(true & set(answers)) / len(train)
    assert wanted["zero"] == pytest.approx(wanted["one"], rel=0.02)
    assert wanted["two"] == pytest.approx(0.6 * (29 / 64 + 1 / 64) / 3, rel=0.05)
    assert wanted["zero"] == pytest.approx(0.6 * 29 / 64 / 3, rel=0.05)


def test_training_never_names_what_it_never_shows(asked):
    text = " ".join(question.text for questions in asked for question in questions)
    assert "red circle" in text and not any(pair in text for pair in UNSEEN_PAIRS)


def test_the_same_generator_asks_the_same(train):
    texts = "\n".join(
        q.text + q.answer for s in (0, 1) for scene in train[:200] for q in ask(scene, np.random.default_rng(s))
    )
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "1a577d8e6fc54553"


# ---- questions to judge by -------------------------------------------------------------------------------------------


def balanced(judged):
    """Are all answers to a text (of a rare form: to any of its texts) equally frequent?"""
    groups = defaultdict(Counter)
    for _, question in judged:
        rare = FORMS[question.form].rare
        groups[question.form, None if rare else question.text][question.answer] += 1
        groups[question.form, None if rare else question.text].words = question.words
    for (name, text), counts in groups.items():
        assert set(counts) == set(FORMS[name].answers_to(counts.words)), (text, counts)
        assert len(set(counts.values())) == 1, (text, counts)


@pytest.mark.parametrize("split, n, total", [("val", 100, 540), ("test", 300, 1740), ("unseen", 150, 840)])
def test_judged_questions_are_balanced_true_and_as_many_as_promised(split, n, total):
    scenes = split_scenes(split, seed=0, train=1).read(np.arange(500))
    judged = judge(scenes, n, wanted=about_unseen if split == "unseen" else None)
    assert judged == judge(scenes, n, wanted=about_unseen if split == "unseen" else None)
    balanced(judged)
    assert len(judged) >= total and len({(i, question.text) for i, question in judged}) == len(judged)
    for kind, count in Counter(question.kind for _, question in judged).items():
        assert 0.8 * n < count <= n + 2, kind
    for i, question in judged:
        assert truth(question.text, scenes[i]) == question.answer


def test_what_is_often_answered_in_training_is_no_help(asked, test, unseen):
    """A baseline that has learnt the most frequent answer to each text, and of each form for texts it has not met."""
    texts, forms = defaultdict(Counter), defaultdict(Counter)
    for question in (question for questions in asked for question in questions):
        texts[question.text][question.answer] += 1
        forms[question.form][question.answer] += 1
    for scenes, n, wanted in ((test, 300, None), (unseen, 150, about_unseen)):
        right, chance = defaultdict(list), defaultdict(list)
        for _, question in judge(scenes, n, wanted=wanted):
            known = texts[question.text] if question.text in texts else forms[question.form]
            right[question.kind].append(max(known, key=known.get) == question.answer)
            chance[question.kind].append(question.chance)
        for kind in KINDS:  # where: the looks of a rare form have no balance of their own, and what is left is luck
            assert abs(np.mean(right[kind]) - np.mean(chance[kind])) < (0.04 if kind == "where" else 1e-9), kind
        overall = [np.mean([value for kind in KINDS for value in part[kind]]) for part in (right, chance)]
        assert abs(overall[0] - overall[1]) < 0.015


def test_questions_about_the_unseen_speak_of_unseen_objects(unseen):
    assert all(any(f"{o.colour} {o.shape}" in UNSEEN_PAIRS for o in scene.objects) for scene in unseen)
    for i, question in judge(unseen, 150, wanted=about_unseen):
        strange = [o for o in unseen[i].objects if f"{o.colour} {o.shape}" in UNSEEN_PAIRS]
        if question.form in ("place", "exist near", "exist far"):
            assert any(pair in question.text for pair in UNSEEN_PAIRS)
        elif question.form in ("shape at", "colour at"):
            assert question.words[0] in {o.place for o in strange}
            assert question.answer in {value for o in strange for value in (o.shape, o.colour)}
        elif question.answer != "zero":
            assert question.form not in ("shape of", "colour of")  # their text would be enough
            named = " ".join(question.words)
            assert not named or any(o.colour in named or o.shape in named for o in strange)


def test_too_few_scenes_are_too_few_questions(test):
    assert judge([], 100) == []
    few = judge(test[:20], 300)
    balanced(few)
    assert 0 < len(few) < 600


def test_every_form_has_its_wordings_and_phrases():
    assert len({phrase("shape at", ("top",), i) for i in range(variations("shape at"))}) == 6
    assert {phrase("side", ("circle", "left of", "star"), i) for i in range(2)} == {
        "is the circle left of the star?",
        "is the circle to the left of the star?",
    }
    assert len(PARTNERS) == 16 and all(len(others) == 7 for others in PARTNERS.values())
