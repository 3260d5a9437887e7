"""Pictures of the shapes world show what the scenes say: colours and places are recovered from pixels alone."""

import hashlib
import time

import numpy as np
import pytest

from minivlm.datasets.shapes import split_scenes
from minivlm.datasets.shapes.render import atlas, inside_polygon, render
from minivlm.datasets.shapes.scenes import EXTENTS, PALETTE, RADII, SHAPES, UNIT, draw_scenes


def vivid(image):
    """(S, S) bool: where a pixel is far from grey. Backgrounds never are, their tint and noise included."""
    image = image.astype(int)
    return image.max(-1) - image.min(-1) > 75


def cell(mask):
    """The cell of the 3 × 3 grid in which the centre of mass lies."""
    y, x = (axis.mean() for axis in np.nonzero(mask))
    S = len(mask)
    return 3 * int(3 * (y + 0.5) / S) + int(3 * (x + 0.5) / S)


def colour(image, mask):
    """The nearest of the eight colours to the typical colour under the mask."""
    return np.abs(PALETTE - np.median(image[mask], axis=0)).sum(-1).argmin()


@pytest.mark.parametrize("image_size, digest", [(64, "cc94862943b85e6f"), (48, "9afddf69f4f2515e")])
def test_the_same_seed_means_the_same_bytes_everywhere(image_size, digest):
    """Pinned: if this fails, pictures have changed, and VERSION must rise."""
    images = render(draw_scenes(100, seed=0, stream=0), image_size)
    assert images.shape == (100, image_size, image_size, 3) and images.dtype == np.uint8
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("image_size", [48, 64, 96])
@pytest.mark.parametrize("split", ["single_seen", "single_unseen"])
def test_one_object_has_its_colour_and_its_place(split, image_size):
    scenes = split_scenes(split, seed=0, train=1)
    for i, image in enumerate(render(scenes, image_size)):
        mask = vivid(image)
        assert colour(image, mask) == scenes.colour[i, 0]
        assert cell(mask) == scenes.place[i, 0]


def test_one_object_fills_its_box():
    """Up to a pixel or two: centres are rounded to whole pixels, and pale rims and tips do not count as vivid."""
    scenes = split_scenes("single_seen", seed=0, train=1)
    for i, image in enumerate(render(scenes, 64)):
        y, x = np.nonzero(vivid(image))
        found = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
        inwards = (found - 64 * scenes.box[i, 0]) * [1, 1, -1, -1]
        assert inwards.min() >= -1.5 and inwards.max() <= 2.5


def test_several_objects_each_in_its_cell():
    scenes = split_scenes("val", seed=0, train=1)
    for i, image in enumerate(render(scenes, 96)):
        for place in range(9):
            part = (slice(32 * (place // 3), 32 * (place // 3) + 32), slice(32 * (place % 3), 32 * (place % 3) + 32))
            mask = vivid(image[part])
            k = np.flatnonzero(scenes.present[i] & (scenes.place[i] == place))
            assert (mask.sum() > 40) == (len(k) == 1)
            if len(k):
                assert colour(image[part], mask) == scenes.colour[i, k[0]]


def test_a_picture_does_not_depend_on_its_neighbours():
    scenes = draw_scenes(150, seed=1, stream=0)
    images = render(scenes, 32)
    for i in (0, 63, 64, 149):
        assert np.array_equal(render(scenes.take([i]), 32)[0], images[i])
    assert render(scenes.take([]), 32).shape == (0, 32, 32, 3)


def test_shapes_are_told_apart_when_small():
    """No two small shapes share more than 85 % of what either covers."""
    alpha = atlas(64)[0][:, 0, :, ::3].reshape(len(SHAPES), -1).astype(float)
    for i in range(len(SHAPES)):
        for j in range(i):
            assert np.minimum(alpha[i], alpha[j]).sum() / np.maximum(alpha[i], alpha[j]).sum() < 0.85, (
                SHAPES[i],
                SHAPES[j],
            )


def test_sprites_have_the_extents_that_boxes_promise_and_sit_in_the_middle():
    for sprites, radii in zip(atlas(256), RADII, strict=True):
        for shape, rows in enumerate(sprites):
            for sprite, radius in zip(rows, radii, strict=True):
                alpha = sprite[:, ::3]
                covered = [np.flatnonzero(alpha.any(axis=axis)) for axis in (0, 1)]
                for at, extent in zip(covered, EXTENTS[shape], strict=True):
                    half = radius * extent / 100 * 256 / UNIT
                    assert abs(len(alpha) / 2 - at[0] - half) <= 1.5 and abs(at[-1] + 1 - len(alpha) / 2 - half) <= 1.5
                assert np.abs(alpha - alpha[:, ::-1]).max() <= 8  # left and right agree, up to samples on an outline


def test_polygon_by_hand():
    x, y = np.meshgrid([-1, 1, 3], [-1, 1, 3])
    found = inside_polygon([(0, 0), (2, 0), (2, 2), (0, 2)], x, y)
    assert np.array_equal(found, [[False, False, False], [False, True, False], [False, False, False]])


def test_three_thousand_pictures_a_second():
    """On one core; ten times as many are usual, so that a busy machine passes as well."""
    scenes = draw_scenes(1024, seed=0, stream=0)
    render(scenes.take(slice(8)), 64)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        render(scenes, 64)
        seconds.append(time.perf_counter() - start)
    assert 1024 / min(seconds) > 3000
