"""Augmentation: what it does to pixels, what it leaves alone because of the caption, and that chance comes from rng alone."""

import threading

import numpy as np
import pytest
import torch

from minivlm.datasets.transforms import COLOURS, PLACES, SIDES, TrainTransform, change_colours, words

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STILL = (0.0, 0.0, 0.0, 0.0)


def noise(count=8, height=40, width=52, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def plain_transform(size=32, **options):
    """Pixels in 0..1 come out: no mean, no deviation."""
    return TrainTransform(size, (0, 0, 0), (1, 1, 1), **options)


def run(transform, images, caption, seed=0):
    return transform(images, [caption] * len(images), generators(len(images), seed))


def generators(count, seed=0):
    return [np.random.default_rng((seed, i)) for i in range(count)]


def boxes_of(images, **options):
    rng, n = np.random.default_rng(0), len(images)
    sizes = [image.shape[:2] for image in images]
    return plain_transform(**options).crop_boxes(sizes, rng.random((n, 10)), rng.random((n, 10)), rng.random((n, 2)))


def as_tensor(images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


# -------------------------------------------------------------------------------------------------------- without chance


def test_images_of_the_right_size_are_normalised_and_nothing_else():
    images = noise(height=32, width=32)
    batch = TrainTransform(32, MEAN, STD, augment=False)(images, ["red"] * 8, None)
    expected = (as_tensor(images) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(batch, expected)
    assert batch.dtype == torch.float32 and batch.is_contiguous()


def test_without_chance_the_model_sees_what_the_processor_makes():
    from minivlm.processor import Processor

    processor = Processor.train(["a"], image_size=32, context=8, mean=MEAN, std=STD)
    images = noise(height=32, width=32)
    batch = TrainTransform(32, MEAN, STD, augment=False)(images, [""] * 8, None)
    assert torch.allclose(batch, processor.images(images), atol=1e-6, rtol=0)


def test_other_sizes_are_resized_by_the_shorter_side_and_cut_to_the_centre():
    wide = np.zeros((64, 128, 3), dtype=np.uint8)
    wide[:, 32:96] = 200  # the centre square
    batch = plain_transform(augment=False)([wide, noise(1, 32, 32)[0]], ["", ""], None)
    assert torch.all((batch[0, :, :, 2:-2] - 200 / 255).abs() < 1e-6)  # but for ringing at the square's rim
    assert torch.equal(batch[1:], as_tensor(noise(1, 32, 32)))


# ---------------------------------------------------------------------------------------------------------------- chance


def test_the_same_rng_gives_the_same_bytes_and_another_does_not():
    transform, images = TrainTransform(32, MEAN, STD), noise()
    first = run(transform, images, "a dog", seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(run(transform, images, "a dog", seed=1), first)
    assert not torch.equal(run(transform, images, "a dog", seed=2), first)


def test_threads_do_not_disturb_each_other():
    transform, images, results = plain_transform(), noise(), {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: run(transform, images, "a dog", seed)}))
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], run(transform, images, "a dog", seed)) for seed in range(8))


def test_a_caption_changes_only_its_own_image():
    transform, images = plain_transform(), noise(2)
    one = transform(images, ["a dog", "a dog"], generators(2))
    two = transform(images, ["a red dog at the left", "a dog"], generators(2))
    assert torch.equal(one[1], two[1]) and not torch.equal(one[0], two[0])


def test_every_kind_of_augmentation_happens():
    images = noise(32, 32, 32)
    plain = as_tensor(images)
    kinds = {
        "flip": plain_transform(scale=(1, 1), ratio=(1, 1), colour_jitter=STILL),
        "crop": plain_transform(flip=False, colour_jitter=STILL),
        "colour": plain_transform(flip=False, scale=(1, 1), ratio=(1, 1)),
    }
    changed = {
        name: (run(transform, images, "a dog") != plain).flatten(1).any(1).sum() for name, transform in kinds.items()
    }
    assert 5 < changed["flip"] < 27
    assert changed["crop"] > 27 and changed["colour"] == 32
    nothing = plain_transform(flip=False, scale=(1, 1), ratio=(1, 1), colour_jitter=STILL)
    assert torch.allclose(run(nothing, images, "a dog"), plain, atol=1e-6)


def test_crops_keep_their_share_and_ratio_and_lie_inside():
    images = [np.zeros((90, 120, 3), dtype=np.uint8)] * 500
    boxes = boxes_of(images)
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 90).all() and (left + w <= 120).all()
    share = h * w / (90 * 120)
    assert share.min() > 0.78 and share.max() <= 1 and share.std() > 0.03
    assert (w / h).min() > 0.74 and (w / h).max() < 1.35
    assert len(np.unique(top)) > 5 and len(np.unique(left)) > 5


def test_a_panorama_gets_the_largest_centred_box():
    wide, tall = np.zeros((30, 300, 3), dtype=np.uint8), np.zeros((300, 30, 3), dtype=np.uint8)
    boxes = boxes_of([wide, tall])
    assert boxes.tolist() == [[0, 130, 30, 40], [130, 0, 40, 30]]


# ------------------------------------------------------------------------------------------------- beside torchvision's


def by_torchvision(transform, image, caption, rng):
    """The plain way: each draw a call, a function of torchvision for each step, a copy for each."""
    from minivlm._torchvision import functional as F

    named = words(caption)
    H, W = image.shape[:2]
    areas = H * W * rng.uniform(*transform.scale, 10)
    ratios = np.exp(rng.uniform(*np.log(transform.ratio), 10))
    where, mirrored, jitter = rng.random(2), rng.random() < 0.5, rng.uniform(-1, 1, 4) * transform.colour_jitter
    sides = [(round(float(np.sqrt(a / r))), round(float(np.sqrt(a * r)))) for a, r in zip(areas, ratios, strict=True)]
    h, w = next((h, w) for h, w in sides if h <= H and w <= W)
    box = int(where[0] * (H - h + 1)), int(where[1] * (W - w + 1)), h, w
    pixels, size = torch.from_numpy(image).permute(2, 0, 1), [transform.image_size] * 2
    how = {"interpolation": F.InterpolationMode.BICUBIC, "antialias": True}
    pixels = F.resize(pixels, size, **how) if named & PLACES else F.resized_crop(pixels, *box, size, **how)
    pixels = F.horizontal_flip(pixels) if mirrored and not named & SIDES else pixels
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format).div(255)
    brightness, contrast, saturation, hue = jitter.tolist()
    pixels = F.adjust_contrast(F.adjust_brightness(pixels, 1 + brightness), 1 + contrast)
    if not named & COLOURS:
        pixels = F.adjust_hue(F.adjust_saturation(pixels, 1 + saturation), hue)
    return (pixels - transform.mean) / transform.std


@pytest.mark.parametrize("size", [30, 64])
def test_every_step_is_torchvisions_to_the_bit(size):
    transform = TrainTransform(size, MEAN, STD, colour_jitter=(0.2, 0.2, 0.1, 0.05))
    captions = ["a dog runs", "a red dog", "a dog on the left", "the dog at the top", "the red dog at the top left"] * 4
    images = [noise(1, 70 + i, 90 - i, seed=i)[0] for i in range(len(captions))]
    batch = transform(images, captions, generators(len(images)))
    for one, *how in zip(batch, images, captions, generators(len(images)), strict=True):
        assert torch.equal(one, by_torchvision(transform, *how))


def test_a_batch_that_somebody_holds_is_not_written_over():
    transform, images = plain_transform(), noise()
    first = run(transform, images, "a dog", seed=1)
    copy, row = first.clone(), run(transform, images, "a dog", seed=2)[3]
    kept = row.clone()
    for seed in range(6):
        run(transform, images, "a dog", seed=seed)
    assert torch.equal(first, copy) and torch.equal(row, kept)  # whole, or a view of it
    place = first.data_ptr()
    del first
    assert place in [run(transform, images, "a dog").data_ptr() for _ in range(2)]  # and what nobody holds is


# ------------------------------------------------------------------------------------------------------- true captions


@pytest.mark.parametrize(
    "caption",
    ["a dog on the left", "Left-hand drive", "the rightmost cup", "the east wing", "a photo of a 3.", "the letter b"],
)
def test_what_a_mirror_would_belie_is_not_mirrored(caption):
    images = noise(32, 32, 32)
    transform = plain_transform(scale=(1, 1), ratio=(1, 1), colour_jitter=STILL)
    assert torch.equal(run(transform, images, caption), as_tensor(images))


def test_what_a_mirror_does_not_touch_is_mirrored():
    images = noise(32, 32, 32)
    transform = plain_transform(scale=(1, 1), ratio=(1, 1), colour_jitter=STILL)
    mirrored = run(transform, images, "a bright yellow leaf, upright")  # neither "right" nor "left" as words
    plain = as_tensor(images)
    flipped = (mirrored != plain).flatten(1).any(1)
    assert 5 < flipped.sum() < 27
    assert torch.equal(mirrored[flipped], plain[flipped].flip(-1))


@pytest.mark.parametrize("caption", ["a bird at the top", "in the upper corner", "near the edge", "a cup on the right"])
def test_what_stands_at_an_edge_is_not_cut_off(caption):
    images = noise(16, 32, 32)
    transform = plain_transform(flip=False, colour_jitter=STILL)
    assert torch.equal(run(transform, images, caption), as_tensor(images))
    assert not torch.equal(run(transform, images, "a bird in a stopped car"), as_tensor(images))


@pytest.mark.parametrize("caption", ["a pink flower", "Reddish petals", "a colorful bird", "black and white"])
def test_a_named_colour_keeps_its_hue_and_saturation(caption):
    images = noise(16, 32, 32)
    alone = plain_transform(flip=False, scale=(1, 1), ratio=(1, 1), colour_jitter=(0, 0, 0.5, 0.3))
    assert torch.equal(run(alone, images, caption), as_tensor(images))
    assert not torch.equal(run(alone, images, "a flower"), as_tensor(images))
    brightness = plain_transform(flip=False, scale=(1, 1), ratio=(1, 1), colour_jitter=(0.2, 0, 0, 0))
    dark = [image // 2 for image in images]  # far from white, where brightness would be clipped
    ratio = run(brightness, dark, caption) / as_tensor(dark).clamp_min(1e-6)
    factors = ratio.flatten(1).median(1).values
    assert factors.min() >= 0.8 - 1e-5 and factors.max() <= 1.2 + 1e-5 and factors.std() > 0.05


def test_hue_turns_only_when_asked():
    gray = [np.full((32, 32, 3), shade, dtype=np.uint8) for shade in (50, 100)]
    assert torch.equal(run(plain_transform(), gray, "a dog")[:, 0], run(plain_transform(), gray, "a dog")[:, 2])
    red = [np.array([[[200, 20, 20]]], dtype=np.uint8).repeat(32, 0).repeat(32, 1)] * 8
    turned = run(plain_transform(colour_jitter=(0, 0, 0, 0.5)), red, "a dog")
    assert (turned[:, 0] < turned[:, 1:].amax(1)).any()
    kept = run(plain_transform(), red, "a dog")
    assert (kept[:, 0] > kept[:, 1:].amax(1)).all()


def test_each_jitter_is_what_its_name_says():
    """At −1 brightness is black, contrast one gray, saturation gray in every pixel; a third of a turn makes red green."""
    image = as_tensor(noise(1))[0]
    black, flat, gray = (change_colours(image.clone(), jitter) for jitter in (-np.eye(4)[:3]).tolist())
    assert torch.equal(black, torch.zeros_like(image))
    assert torch.allclose(flat, flat.mean().expand_as(flat), atol=1e-5) and 0.3 < flat.mean() < 0.7
    assert torch.allclose(gray, gray.mean(0, keepdim=True).expand_as(gray), atol=1e-5) and gray.std() > 0.1
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].repeat(1, 4, 4)
    green = change_colours(red.clone(), [0, 0, 0, 1 / 3])
    assert torch.allclose(green, red[[1, 0, 2]], atol=1e-5)


def test_words_are_whole_words():
    assert words("Left-hand side, gate 12, stopped") == {"left", "hand", "side", "gate", "1", "2", "stopped"}


@pytest.mark.parametrize(
    "caption",
    [
        *("左边的猫", "猫は右にいる", "Кот слева", "القط على اليسار", "η γάτα αριστερά", "बिल्ली बाईं ओर है"),
        *(
            "Der Hund steht links im Bild",
            "un chat à gauche",
            "un chat a gauche",
            "El gato de la izquierda",
            "il gatto a destra",
        ),
        *(
            "een man links in het water",
            "kucing di kiri",
            "katten til venstre",
            "kissa vasemmalla",
            "pies po lewej stronie",
        ),
        *(
            "a photo of a gato izquierdo.",
            "a photo of a 左手.",
            "a picture of a linksabbieger.",
            "a dog, 左",
            "a man (gauche)",
        ),
        *("rot", "zwei Blumen", "qwertz", "", "12"),
    ],
)
def test_what_cannot_be_read_is_neither_mirrored_nor_cropped_nor_recoloured(caption):
    images = noise(16, 32, 32)
    transform = plain_transform(colour_jitter=(0, 0, 0.5, 0.3))
    assert torch.allclose(run(transform, images, caption), as_tensor(images), atol=1e-6)


@pytest.mark.parametrize(
    "caption",
    [
        *("cat", "two brown dogs running through snow", "A man’s hat – “old”", "this flower has petals with spots"),
        *(
            "a photo of a bulbasaur.",
            "this is a hard-leaved pocket orchid.",
            "a tench.",
            "there is a blue star and a ring",
        ),
    ],
)
def test_what_is_english_is_mirrored(caption):
    images = noise(16, 32, 32)
    transform = plain_transform(scale=(1, 1), ratio=(1, 1), colour_jitter=STILL)
    assert not torch.equal(run(transform, images, caption), as_tensor(images))


@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1), (3, 4000)])
def test_without_chance_a_line_of_pixels_shows_its_middle(size):
    line = np.zeros((*size, 3), dtype=np.uint8)
    line[tuple(slice(side // 2 - 20, side // 2 + 20) if side > 40 else slice(None) for side in size)] = 255
    batch = plain_transform(64, augment=False)([line], [""], None)
    assert batch.shape == (1, 3, 64, 64) and batch.min() > 0.99
