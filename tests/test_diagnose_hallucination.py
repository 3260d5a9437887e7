"""--diagnose hallucination: a captioner with a strong prior is found, and each remedy reduces what it makes up by more than the
interval; POPE and CHAIR are those of a hand computation; and what cannot be judged is said before the work."""

import json
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minivlm.datasets.shapes import ShapesWorld, make_shapes
from minivlm.datasets.shapes.facts import pair
from minivlm.datasets.shapes.negatives import agrees
from minivlm.datasets.shapes.scenes import Scene
from minivlm.datasets.shapes.text import canonical, parse
from minivlm.datasets.shapes.usual import usual_colour
from minivlm.errors import UserError
from minivlm.evaluate.command import main
from minivlm.evaluate.diagnose import diagnose, hallucination, regions
from minivlm.evaluate.diagnose.matcher import Judge, check_matcher, yes_to
from minivlm.evaluate.diagnose.objects import objects_of
from minivlm.evaluate.diagnose.pope import SPLITS, pope_questions, scores_by_split
from tests.matchers import Oracle, WordProcessor
from tests.speakers import captioner
from tests.speakers import processor as small_processor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "world"
    make_shapes(directory, train=16, image_size=32, progress=False)
    return directory


class Partial(Oracle):
    """Matches a text that names some of the objects as well."""

    def match(self, images, tokens, mask):
        many, texts = self.shown(self.image_features(images)), self.processor.read(tokens, mask)
        fits = [
            all(any(agrees(said, thing) for thing in objects) for said in parse(text))
            for objects, text in zip(many, texts, strict=True)
        ]
        return torch.tensor([[-1.0, 1.0] if yes else [1.0, -1.0] for yes in fits])


@pytest.fixture(scope="module")
def oracle(world):
    processor = WordProcessor()
    return Judge(
        Partial([ShapesWorld(world, split) for split in ("test", "unseen")], processor), processor, "an oracle"
    )


@pytest.fixture
def captions_with_a_prior(monkeypatch, oracle):
    """A captioner that takes an object for one in the usual colour of its shape, as often as `prior` says."""
    monkeypatch.setattr(hallucination, "MOST", 80)

    def with_prior(prior):
        def caption_all(images, model, processor, *, max_new_tokens, temperature=0.0, seed=0):
            texts = []
            for i, [image] in enumerate(images):
                number = oracle.model.number.get(image.tobytes())
                if number is None:  # a region alone
                    texts.append("nothing")
                    continue
                rng = np.random.default_rng([i, seed + 1 if temperature else 0])
                objects = oracle.model.scenes[number]
                named = [o._replace(colour=usual_colour(o.shape)) if rng.random() < prior else o for o in objects]
                texts.append(canonical(Scene(tuple(named))))
            return texts

        monkeypatch.setattr(hallucination, "caption_all", caption_all)
        model = SimpleNamespace(abilities=frozenset({"caption"}), takes_images=True)
        return model, SimpleNamespace(image_size=32, config=SimpleNamespace(chat=None, image_tokens=0))

    return with_prior


def test_a_captioner_with_a_strong_prior_makes_up_more_and_reranking_helps_by_more_than_the_interval(
    captions_with_a_prior, world, oracle
):
    found = {}
    for prior in (0.0, 0.1, 0.6):
        model, processor = captions_with_a_prior(prior)
        [found[prior]] = diagnose(model, processor, world, ["hallucination"], matcher=oracle)
    none, weak, strong = (pitfall.figures for pitfall in found.values())
    assert found[0.0].verdict.startswith("not found") and found[0.6].verdict.startswith("found: ")
    assert none["CHAIR_s"].value == 0 and none["objects named"].value == 1
    assert weak["CHAIR_s"].interval[1] < strong["CHAIR_s"].interval[0]
    for remedy in ("re-ranked by matching", "grounded by questions"):
        for name in ("CHAIR_s", "never-seen pairs, CHAIR_s"):
            prefix = name.removesuffix("CHAIR_s")
            before, after = found[0.6].effect[f"{prefix}{remedy}: CHAIR_s"]
            assert after.samples.paired(before.samples).high < -0.1
    assert found[0.6].image.size[0] > 800


def test_a_model_without_a_matcher_is_told_of_one(captions_with_a_prior, world):
    model, processor = captions_with_a_prior(0.5)
    [pitfall] = diagnose(model, processor, world, ["hallucination"])
    assert "--matcher MODEL" in pitfall.remedy
    assert not any("re-ranked" in name for name in pitfall.effect)


def test_chair_is_that_of_a_hand_computation(world):
    objects = objects_of(world)
    there = [{"red circle", "blue star"}, {"pink ring"}, {"red circle"}]
    shown = hallucination.Shown(objects, SimpleNamespace(key=str), range(3), there, [[], [], []])
    texts = ["a red circle and a blue star", "a pink ring and a green heart and a green heart", "nothing"]
    scores = shown.chair(texts)
    assert scores["CHAIR_s"].value == 1 / 3  # one caption of three
    assert scores["CHAIR_i"].value == 2 / 5  # two mentions of five
    assert scores["objects named"].value == 3 / 4
    assert scores["CHAIR_s"].n == 3 and scores["CHAIR_i"].n == 5


def test_a_region_alone_keeps_its_object_and_loses_the_others(world):
    split = ShapesWorld(world, "test")
    i = next(i for i, scene in enumerate(split.scenes.read(np.arange(50))) if len(scene.objects) == 2)
    [image] = split.images([i])
    first, second = (thing.box for thing in split.scenes[i].objects)
    shown = regions.alone(image, first)
    at = lambda box: tuple(slice(int(32 * box[k]), int(32 * box[k + 2]) + 1) for k in (1, 0))
    assert (shown[at(first)] == image[at(first)]).all()
    assert len(np.unique(shown[at(second)].reshape(-1, 3), axis=0)) == 1  # of one colour


def test_captions_that_name_no_known_object_are_not_judged(captions_with_a_prior, tmp_path, monkeypatch):
    model, processor = captions_with_a_prior(0)
    monkeypatch.setattr(hallucination, "caption_all", lambda images, *args, **how: ["something"] * len(images))
    write_folder(tmp_path, ["two dogs", "a cat"])
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    [pitfall] = diagnose(model, processor, tmp_path, ["hallucination"], objects=str(tmp_path / "names.txt"))
    assert pitfall.verdict.startswith("not found, and not to be found: captions name 0.0% of the objects")
    assert "CHAIR_i" not in pitfall.figures


def test_a_folder_of_classes_is_judged_by_its_labels(captions_with_a_prior, tmp_path, monkeypatch):
    model, processor = captions_with_a_prior(0)
    monkeypatch.setattr(
        hallucination, "caption_all", lambda images, *args, **how: ["two dogs and a sea lion"] * len(images)
    )
    for i in range(6):
        path = tmp_path / "test" / ("dog", "sea_lion", "cat")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(path)
    [pitfall] = diagnose(model, processor, tmp_path, ["hallucination"])
    assert pitfall.figures["CHAIR_s"].value == 1 and pitfall.figures["CHAIR_i"].value == 8 / 12
    assert pitfall.figures["objects named"].value == 4 / 6


# ---- POPE ------------------------------------------------------------------------------------------------------------


def test_pope_asks_as_often_for_what_is_there_as_for_what_is_not():
    names = ["dog", "cat", "car", "bus", "boat", "kite"]
    there = [{"dog", "cat"}, {"car", "bus"}, {"dog", "cat"}, {"dog"}, set(), set(names)]
    asked = pope_questions(there, names)
    for split in SPLITS:
        rows = [q for q in asked if q.split == split]
        assert sum(q.there for q in rows) == sum(not q.there for q in rows) == 7
        assert all((q.name in there[q.image]) == q.there for q in rows)
    wrong = {split: [q.name for q in asked if q.split == split and not q.there] for split in SPLITS}
    assert wrong["popular"][-1] == "cat"  # for the image of a dog alone: cat and dog are the most frequent
    assert [q.name for q in asked if q.split == "adversarial" and q.image == 3 and not q.there] == ["cat"]


def test_pope_scores_are_those_of_a_hand_computation():
    asked = pope_questions([{"dog", "cat"}, {"car"}], ["dog", "cat", "car", "bus", "tram"])
    rows = [q for q in asked if q.split == "random"]
    yes = [
        q.there or k == 0 for k, q in enumerate(sorted(rows, key=lambda q: q.there))
    ]  # one of three is affirmed too much
    scores = scores_by_split(sorted(rows, key=lambda q: q.there), yes, ["a", "b"])
    assert scores["POPE random: accuracy"].value == 5 / 6
    assert scores["POPE random: F1"].value == pytest.approx(2 * 3 / (2 * 3 + 1))
    assert scores["POPE random: yes"].value == 4 / 6


def test_an_answer_is_yes_unless_it_says_no(monkeypatch):
    said = cycle(["yes", "No, there is none.", "There is not a dog", "a dog. No cat"])
    monkeypatch.setattr(
        "minivlm.evaluate.diagnose.matcher.answer_all", lambda samples, *a, **k: [next(said) for _ in samples]
    )
    assert yes_to([(None, "?")] * 4, Judge(None, None, "")) == [True, False, False, True]


# ---- which objects there are -----------------------------------------------------------------------------------------


def write_folder(directory, captions):
    rows = []
    for i, caption in enumerate(captions):
        Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(directory / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": caption, "split": "test"})
    (directory / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_objects_come_from_a_list_with_synonyms(tmp_path):
    write_folder(tmp_path, ["two dogs beside a bus", "a puppy"])
    (tmp_path / "names.txt").write_text("dog, puppy\nbus\nteddy bear\nbear\n")
    objects = objects_of(tmp_path, str(tmp_path / "names.txt"))
    assert objects.names == ("dog", "bus", "teddy bear", "bear")
    assert objects.named("Two puppys and buses, a Teddy Bear; a hotdog") == ["dog", "bus", "teddy bear"]


def test_objects_come_from_boxes_and_labels(tmp_path):
    write_folder(tmp_path, ["a street"])
    instances = {
        "images": [{"id": 1, "file_name": "0.png", "width": 32, "height": 32}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 8, 8]}],
        "categories": [{"id": 7, "name": "Dog"}, {"id": 8, "name": "bus"}],
    }
    (tmp_path / "instances_val.json").write_text(json.dumps(instances))
    objects = objects_of(tmp_path)
    assert objects.labels("0.png") == {"dog"} and objects.named("a dog and a bus") == ["dog"]
    (tmp_path / "labelled/sea_lion").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "labelled/sea_lion/a.png")
    (tmp_path / "labelled/cat").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "labelled/cat/b.png")
    labelled = objects_of(tmp_path / "labelled")
    assert labelled.names == ("cat", "sea lion") and labelled.ask("cat") == "is there a cat in the image?"
    assert {name for key in ("sea_lion/a.png", "cat/b.png") for name in labelled.labels(key)} <= {"sea lion", "cat"}


def test_the_objects_of_a_scene_are_its_pairs(world):
    objects = objects_of(world)
    scene = ShapesWorld(world, "test").scenes[3]
    assert objects.named(canonical(scene)) == [pair(thing) for thing in parse(canonical(scene))]
    assert objects.ask("orange star") == "is there an orange star?"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_judged_is_said_in_a_sentence(captions_with_a_prior, tmp_path, world):
    model, processor = captions_with_a_prior(0)
    write_folder(tmp_path, ["two dogs", "a cat"])
    with pytest.raises(UserError, match=r"nothing says which objects .* a line each, as --objects FILE"):
        diagnose(model, processor, tmp_path, ["hallucination"])
    (tmp_path / "names.txt").write_text("horse\n")
    with pytest.raises(UserError, match=r"names any of its 1 objects"):
        diagnose(model, processor, tmp_path, ["hallucination"], objects=str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"names no objects: write a name a line"):
        diagnose(model, processor, tmp_path, ["hallucination"], objects=str(tmp_path / "names.txt"))
    with pytest.raises(UserError, match=r"objects of the shapes world are known; leave it out"):
        diagnose(model, processor, world, ["hallucination"], objects=str(tmp_path / "names.txt"))
    silent = SimpleNamespace(abilities=frozenset({"encode"}), takes_images=True)
    assert "neither describes images nor answers" in hallucination.left_out(silent, processor, world)


def test_a_matcher_that_cannot_match_is_refused_before_the_work(world, tmp_path):
    with pytest.raises(
        UserError, match=r"--matcher out/x: this ImageCaptioningModel cannot match texts .* A BLIP or a CLIP can"
    ):
        check_matcher(captioner(), small_processor(), "out/x")
    captioner().save_pretrained(tmp_path / "model", processor=small_processor(image_tokens=0))
    images = ["--images", str(tmp_path / "images"), "--data", str(world)]
    with pytest.raises(UserError, match=r"--matcher .*model: this ImageCaptioningModel cannot match"):
        main([str(tmp_path / "model"), "--diagnose", "hallucination", "--matcher", str(tmp_path / "model"), *images])


@pytest.mark.parametrize("given", [["--matcher", "out/blip"], ["--diagnose", "resolution", "--objects", "names.txt"]])
def test_options_of_a_pitfall_that_is_not_asked_for_are_refused(given):
    with pytest.raises(UserError, match=r"--(matcher|objects) belongs to --diagnose hallucination"):
        main(["out/coca", *given])
