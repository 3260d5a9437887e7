"""Resolution: a model that is blind to small objects is found out, and what has more pixels helps it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minivlm.datasets.boxes import Box, boxes_in, named_size
from minivlm.datasets.folder import TEMPLATES
from minivlm.datasets.shapes.conversations import ShapesConversations
from minivlm.datasets.shapes.questions import judge
from minivlm.errors import UserError
from minivlm.evaluate.diagnose import diagnose, sized_samples
from minivlm.evaluate.diagnose.finer import larger, tiled, variants
from minivlm.evaluate.diagnose.resolution import FALL, left_out, ranges_of
from minivlm.layers import LanguageModel, LanguageModelConfig, TextConfig, VisionConfig
from minivlm.metrics import Samples
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from minivlm.processor_config import ProcessorConfig
from tests import speakers
from tests.small_recipes import small_recipe, small_world

KINDS = ("upright", "level", "checked")
SMALL, LARGE = 6, 24  # pixels of 48; the model is given 16


def picture(kind: str, side: int, rng) -> tuple[np.ndarray, list[int]]:
    """Somewhere on grey a square with four stripes: in the model's 16 pixels, those of a small one cannot be told apart."""
    y, x = np.mgrid[:side, :side] * 4 // side
    lines = {"upright": x, "level": y, "checked": x + y}[kind] % 2
    image = np.full((48, 48, 3), 125, np.uint8) + rng.integers(0, 9, (48, 48, 1), dtype=np.uint8)
    top, left = rng.integers(0, 3, 2) * 16 + rng.integers(0, 11, 2) if side == SMALL else rng.integers(0, 49 - side, 2)
    image[top : top + side, left : left + side] = np.where(lines[..., None], 230, 20)
    return image, [int(left), int(top), side, side]


@pytest.fixture(scope="module")
def low():
    """A CLIP of 16 pixels that has learned the three kinds of stripes, from squares of all sizes: 2 s."""
    rng = np.random.default_rng(0)
    texts = [template.format(kind) for kind in KINDS for template in TEMPLATES]
    processor = Processor.train(texts, vocab_size=300, image_size=16, context=32)
    ids = dict(vocab_size=processor.vocab_size, end_token=processor.end_token)
    vision = VisionConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, pool="mean", stem="convolutions")
    text = TextConfig(width=16, depth=1, heads=2, context=32, **ids)
    model = CLIP(CLIPConfig(vision=vision, text=text, embed_width=16))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    prompts = [processor.text([template.format(kind) for kind in KINDS]) for template in TEMPLATES]
    labels = np.arange(48) % 3
    for step in range(300):
        images = [picture(KINDS[label], int(rng.choice((SMALL, 16, LARGE, 32))), rng)[0] for label in labels]
        logits = 10 * model.encode_image(processor.images(images)) @ model.encode_text(*prompts[step % 5]).T
        optimiser.zero_grad()
        F.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimiser.step()
    return model.eval(), processor


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A folder of classes, with COCO's boxes beside."""
    folder, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(1)
    categories = [{"id": i, "name": kind} for i, kind in enumerate(KINDS)]
    lists = {"images": [], "annotations": [], "categories": categories}
    for i in range(180):
        pixels, box = picture(KINDS[i % 3], (SMALL, LARGE)[i // 3 % 2], rng)
        place = folder / "test" / KINDS[i % 3] / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place)
        lists["images"].append({"id": i, "file_name": place.name, "width": 48, "height": 48})
        lists["annotations"].append({"id": i, "image_id": i, "category_id": i % 3, "bbox": box})
    (folder / "instances.json").write_text(json.dumps(lists), encoding="utf-8")
    return folder


def test_a_model_of_low_resolution_is_shown_blind_to_small_objects_and_more_pixels_help(low, stripes):
    [found] = diagnose(*low, stripes, ["resolution"])
    assert found.verdict.startswith("found: ") and "2 to 3 pixels" in found.verdict
    assert (
        found.figures["zero-shot, 2 to 3 pixels"].value < 0.8 < 0.95 < found.figures["zero-shot, 8 to 12 pixels"].value
    )
    assert found.figures["zero-shot, 2 to 3 pixels"].n == 90 and found.figures[FALL].interval[0] > 0.1
    for remedy in ("3x3 tiles", "images 2 times as large"):
        before, after = found.effect[f"{remedy}: zero-shot, under 3 pixels"]
        assert after.samples.paired(before.samples).low > 0.1  # by more than its interval
    assert found.image.size[0] > 500


def test_without_boxes_it_is_measured_by_what_coarser_images_lose(low, stripes, tmp_path):
    shutil.copytree(stripes / "test", tmp_path / "test")
    [found] = diagnose(*low, tmp_path, ["resolution"])
    assert [*found.figures] == ["zero-shot", *(f"zero-shot, at 1/{by} of the pixels a side" for by in (2, 4))]
    lost = found.figures["zero-shot"].samples.paired(found.figures["zero-shot, at 1/2 of the pixels a side"].samples)
    assert lost.low > 0 and found.verdict.startswith("found: the model lives on fine detail")
    assert found.image is None


def test_a_model_that_knows_nothing_has_nothing_to_lose(low, stripes):
    model = CLIP(low[0].config, seed=1).eval()
    [found] = diagnose(model, low[1], stripes, ["resolution"])
    assert found.verdict.startswith("not found: the model is right in ")


def test_coarser_images_lose_detail_and_nothing_else():
    class Split:
        key = "as it was"

        def __len__(self):
            return 2

        def images(self, indices):
            return [np.tile(np.uint8([[[0] * 3, [255] * 3]]), (40, 20, 1)) for _ in indices]

    coarse = sized_samples.Coarser(Split(), 10)
    [image] = coarse.images([0])
    assert image.shape == (40, 40, 3) and abs(image.astype(int)[4:-4, 4:-4] - 127).max() < 30
    assert len(coarse) == 2 and coarse.key == "as it was"
    assert np.array_equal(sized_samples.Coarser(Split(), 40).images([0])[0], Split().images([0])[0])


def test_sizes_are_those_of_the_objects_that_a_text_names(stripes, tmp_path):
    boxes = boxes_in(stripes)
    assert len(boxes) == 180
    assert named_size(boxes, "test/upright/000.png", "a photo of an upright.", 16) == pytest.approx(2)
    assert np.isnan(named_size(boxes, "test/upright/000.png", "a photo of a dog.", 16))
    assert np.isnan(named_size(boxes, "unknown.png", "a photo of an upright.", 16))
    cats = {"a.jpg": [Box("cat", 0.04), Box("cat", 0.25), Box("dog", 0.01)]}
    assert named_size(cats, "a.jpg", "two cats", 100) == pytest.approx(50)  # the larger cat
    assert named_size(cats, "a.jpg", "a cat and a dog", 100) == pytest.approx(10)  # what is hardest decides
    (tmp_path / "other.json").write_text("[1, 2")
    assert boxes_in(tmp_path) == {}


def test_ranges_have_enough_samples_each():
    pixels = np.concatenate([np.full(40, 2.5), np.full(10, 5.0), np.full(35, 7.0), np.full(3, 40.0), [np.nan] * 50])
    assert [(one.name, len(one.rows)) for one in ranges_of(pixels)] == [("2 to 6 pixels", 50), ("6 to 48 pixels", 38)]
    assert ranges_of(np.full(100, np.nan)) == [] and ranges_of(np.full(5, 9.0)) == []


def test_the_fall_is_the_difference_of_two_means():
    rows = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], dtype=float)
    assert Samples("contrast", rows).value == 0.5


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("small"), train=64)


def test_a_question_has_the_size_of_the_smallest_object_that_it_is_about(directory):
    conversations = ShapesConversations(directory / "world", "val")
    for index, asked in judge(conversations.scenes, 20):
        objects = sized_samples.about(conversations.scenes[index], asked)
        assert bool(objects) == (asked.answer not in ("no", "zero")) or asked.kind in ("compare", "count", "exist")
        if asked.kind in ("what", "colour", "where"):
            assert len(objects) == 1 and asked.answer in objects[0]
            left, top, right, bottom = objects[0].box
            assert sized_samples.side(objects, 32) == pytest.approx(32 * ((right - left) * (bottom - top)) ** 0.5)


@pytest.mark.parametrize("name", ["clip-resnet", "captioner", "llava", "vqa", "multitask"])
def test_what_is_tried_leaves_the_model_as_it_was(name, directory, monkeypatch):
    monkeypatch.setattr(sized_samples, "MOST", 12)
    if name == "llava":
        model, processor = speakers.llava(), speakers.processor()
    else:
        job = small_recipe(name, directory).start(quiet=True)
        model, processor = job.model.eval(), job.processor
    task = sized_samples.task_of(model, processor, directory / "world")()
    before = (model.config, {key: id(value) for key, value in model.named_parameters()})
    own = task.right(model, processor, task.split)
    tried = variants(model, processor)
    assert len(tried) == (2 if name in ("captioner", "vqa") else 4)
    for finer in tried.values():
        with finer(model, processor) as prepared:
            assert prepared.images(task.split.images([0])[0]).shape[-1] == prepared.image_size
            assert len(task.right(model, prepared, task.split)) == len(task.ids)
    assert before == (model.config, {key: id(value) for key, value in model.named_parameters()})
    assert np.array_equal(own, task.right(model, processor, task.split))


def test_a_tile_of_a_clip_is_one_more_view_of_which_the_closest_counts(low):
    model, processor = low
    images = [picture(kind, SMALL, np.random.default_rng(2))[0] for kind in KINDS]

    class Split:
        def images(self, indices):
            return [images[i] for i in indices]

    with tiled(model, processor, n=2) as prepared:
        views = sized_samples.encode_views(model, prepared, Split(), [0, 1, 2])
    pixels = Processor(processor.source, replace(processor.config, tiles=2)).images(images)
    expected = torch.stack([model.encode_image(one) for one in pixels])
    assert torch.allclose(views, expected, atol=1e-5) and views.shape == (3, 5, 16)
    texts = F.normalize(torch.randn(4, 16, dtype=torch.double), dim=-1)
    by_hand = torch.einsum("nvd,md->nvm", views.double(), texts).amax(dim=1)
    assert np.allclose(sized_samples.closest(views, texts), by_hand)


def test_what_cannot_be_tried_is_said(low):
    model, processor = low
    squashed = Processor(processor.source, replace(processor.config, resize="none", crop="none"))
    with pytest.raises(UserError, match="tiles need images of one size"), tiled(model, squashed, n=2):
        pass


def test_larger_images_have_more_patches_of_the_same_size(low):
    model, processor = low
    with larger(model, processor, times=1.5) as prepared:
        assert prepared.image_size == 24 == model.config.vision.image_size
        assert model.vision.embed(prepared.images([np.zeros((48, 48, 3), np.uint8)])).shape == (1, 36, 32)
    assert model.config.vision.image_size == 16


def test_a_language_model_has_no_resolution(directory):
    language = LanguageModel(LanguageModelConfig(vocab_size=64, width=16, depth=1, heads=2, context=8))
    assert "can be asked for nothing" in left_out(language, Processor(None, ProcessorConfig()), directory / "world")
