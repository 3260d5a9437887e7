"""Captions that are false by one attribute: false, by one, and not to be told from true ones by their words."""

import itertools
from collections import Counter

import numpy as np
import pytest

from minivlm.datasets.shapes.facts import UNSEEN_PAIRS, pair
from minivlm.datasets.shapes.negatives import (
    VALUES,
    agrees,
    any_negative,
    changed,
    false_captions,
    is_true,
    one_attribute_negatives,
)
from minivlm.datasets.shapes.scenes import CLASSES, PLACES, Scene, SceneObject, draw_scenes
from minivlm.datasets.shapes.text import canonical, describe, parse

RING = SceneObject("ring", "blue", "small", "centre")
STAR = SceneObject("star", "orange", "large", "right")


@pytest.fixture(scope="module")
def scenes():
    return list(draw_scenes(300, seed=0, stream=0))


def negatives(scenes, seed=0):
    rng = np.random.default_rng(seed)
    return [(scene, one_attribute_negatives(scene, scene.objects, rng)) for scene in scenes]


def difference(a, b):
    """The attributes in which two lists of objects differ, by the best pairing of those that are in one alone."""
    a, b = Counter(a), Counter(b)
    [mine], [other] = (a - b).elements(), (b - a).elements()
    return [name for name in VALUES if getattr(mine, name) != getattr(other, name)]


def test_they_differ_in_the_one_attribute_that_is_told(scenes):
    for scene, false in negatives(scenes):
        assert [attribute for _, attribute in false] == list(VALUES)
        for text, attribute in false:
            assert difference(parse(canonical(scene)), parse(text)) == [attribute]


def test_they_are_false_of_the_scene(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        for said in (scene.objects, parse(describe(scene, rng))):  # the latter may be silent about size and place
            assert all(any(agrees(thing, there) for there in scene.objects) for thing in said)
            for text, _ in one_attribute_negatives(scene, said, rng):
                assert not all(any(agrees(thing, there) for there in scene.objects) for thing in parse(text))


def test_the_words_do_not_give_them_away(scenes):
    for _, false in negatives(scenes):
        for text, _ in false:
            said = parse(text)
            places = [PLACES.index(thing.place) for thing in said]
            assert places == sorted(set(places))  # in reading order, none taken twice
            assert not {pair(thing) for thing in said} & UNSEEN_PAIRS
            assert canonical(Scene(tuple(said))) == text


def test_unseen_pairs_are_named_where_the_picture_shows_one():
    unseen = list(draw_scenes(200, seed=0, stream=5, pairs=np.arange(len(CLASSES))))
    shows = [scene for scene in unseen if any(pair(thing) in UNSEEN_PAIRS for thing in scene.objects)]
    false = [parse(text) for _, some in negatives(shows) for text, _ in some]
    share = np.mean([bool({pair(thing) for thing in said} & UNSEEN_PAIRS) for said in false])
    assert len(shows) > 20 and 0.5 < share < 1


def test_a_caption_that_is_silent_is_changed_in_what_it_tells():
    scene = Scene((RING, STAR))
    said = [SceneObject("ring", "blue"), SceneObject("star", "orange")]
    false = one_attribute_negatives(scene, said, np.random.default_rng(0))
    assert [attribute for _, attribute in false] == ["colour", "shape"]
    assert false == one_attribute_negatives(scene, said, np.random.default_rng(0))


def test_a_change_that_names_another_object_of_the_scene_is_not_false():
    large = RING._replace(size="large", place="left")
    scene = Scene((large, RING))
    said = [SceneObject("ring", "blue", "small"), SceneObject("ring", "blue", "large")]
    assert list(false_captions(scene, said, "size")) == []
    told = [large, RING]
    assert [[thing.size for thing in false] for false in false_captions(scene, told, "size")] == [
        ["small", "small"],
        ["large", "large"],
    ]


def test_every_value_is_as_likely():
    scene = Scene((RING,))
    rng = np.random.default_rng(0)
    drawn = [one_attribute_negatives(scene, scene.objects, rng) for _ in range(800)]
    places = Counter(parse({a: t for t, a in false}["place"])[0].place for false in drawn)
    assert len(places) == 8 and "centre" not in places and max(places.values()) < 1.5 * min(places.values())


def test_any_one_has_each_attribute_as_often():
    scene, rng = Scene((RING, STAR)), np.random.default_rng(0)
    drawn = [tuple(parse(any_negative(scene, scene.objects, rng))) for _ in range(800)]
    changes = Counter(
        attribute for said in drawn for attribute in difference(said, [t._replace(box=None) for t in scene.objects])
    )
    assert sum(changes.values()) == 800
    assert set(changes) == set(VALUES) and max(changes.values()) < 1.4 * min(changes.values())


def test_an_attribute_that_cannot_be_changed_is_passed_over():
    scene, said = Scene((RING,)), [SceneObject("ring", "blue")]  # neither size nor place are told
    possible = {canonical(Scene(tuple(false))) for a in ("colour", "shape") for false in false_captions(scene, said, a)}
    assert {any_negative(scene, said, np.random.default_rng(i)) for i in range(200)} == possible


def test_a_caption_is_true_of_its_scene_in_any_wording_and_false_once_it_is_changed(scenes):
    rng = np.random.default_rng(0)
    for scene, other in itertools.pairwise(scenes):
        assert is_true(canonical(scene), scene) and is_true(describe(scene, rng), scene)
        assert is_true(canonical(other), scene) is (canonical(other) == canonical(scene))
        assert not is_true(changed(canonical(scene), rng), scene)
    two = Scene((RING, STAR))
    assert not is_true("a blue ring", two) and not is_true("a blue ring and a blue ring", two)


def test_what_names_no_shapes_cannot_be_changed():
    assert changed("a dog on the beach", np.random.default_rng(0)) is None
