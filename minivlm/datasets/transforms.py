"""Augmentation that keeps the caption true: images and their captions → one normalised batch.

    (H, W, 3) uint8, sizes differ ──crop, resize──flip──> (B, 3, S, S) ──colour jitter, normalise──> float32

A crop can remove what stands "at the top left", a mirror turns left into right, a change of colour makes a lie of
"a pink flower". So each image's caption is read first, and what could contradict it is left out for that image:

    the caption names        then no         because
    a side (SIDES)           flip            left becomes right; east, west and clockwise likewise
    letters, digits (SIGNS)  flip            a mirrored 3 is no 3
    a place (SIDES, PLACES)  crop            the whole image is resized to the square: nothing at an edge is lost
    a colour (COLOURS)       saturation, hue a pale pink must not become gray, or orange
    what cannot be read      any of these    "links" may be a side: only English is read (english.py)

Brightness and contrast, by a fifth, rename no colour. Not guarded: a count ("four airplanes"), of which a crop that
keeps 80 % may cut one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import log

import numpy as np
import torch
from torch import Tensor

from minivlm.datasets.english import is_english


def words(caption: str) -> set[str]:
    """A caption's words in lower case, and its digits one by one: "Left-hand gate 12" → left, hand, gate, 1, 2."""
    return set(re.findall(r"[a-z]+|\d", caption.lower()))


SIDES = words(
    "left right leftmost rightmost leftward rightward leftwards rightwards lefthand righthand "
    "east west eastern western eastward westward northeast northwest southeast southwest "
    "clockwise counterclockwise anticlockwise"
)
PLACES = SIDES | words(
    "top bottom upper lower uppermost topmost bottommost corner corners edge edges border borders margin "
    "north south northern southern"
)
SIGNS = words("letter letters digit digits number numbers numeral text word words written writing reads")
COLOURS = words(
    "red orange yellow green blue purple violet pink brown black white gray grey cyan magenta teal turquoise beige tan "
    "gold golden silver maroon navy crimson scarlet lavender lilac indigo olive cream ivory peach mauve burgundy "
    "emerald reddish yellowish greenish bluish purplish pinkish brownish whitish grayish greyish "
    "color colors colored colorful colour colours coloured colourful monochrome"
)

GUARDED = SIDES | PLACES | SIGNS | COLOURS


def read(caption: str) -> set[str]:
    """A caption's words; where it is not recognised as English, all words that forbid something as well."""
    named = words(caption)
    return named if is_english(caption, GUARDED) else named | GUARDED


class TrainTransform:
    """transform(images, captions, rng) → (B, 3, S, S) float32, (pixels / 255 − mean) / std.

    images         B arrays (H, W, 3) uint8
    rng            the only source of chance: the same generator state gives the same bytes, in any thread
    flip           mirror half of the images
    colour_jitter  brightness, contrast, saturation and hue, each changed by at most this much (0.2: factors 0.8 to 1.2)
    scale, ratio   share of the area that a crop keeps, and its width / height (Szegedy et al. 2015, §6)
    augment        False: no chance, `rng` may be None; the shorter side is resized to S and the centre square taken
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        flip: bool = True,
        colour_jitter: tuple[float, float, float, float] = (0.2, 0.2, 0.1, 0.0),
        scale: tuple[float, float] = (0.8, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        augment: bool = True,
    ):
        self.image_size, self.flip, self.augment = image_size, flip, augment
        self.colour_jitter, self.scale, self.ratio = colour_jitter, scale, ratio
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(std, dtype=torch.float32)[:, None, None]

    def __call__(
        self, images: Sequence[np.ndarray], captions: Sequence[str], rng: np.random.Generator | None
    ) -> Tensor:
        if not self.augment:
            return self.normalise(self.plain(images))
        named = [read(caption) for caption in captions]
        # Every image takes the same draws whatever its caption is, so one caption never changes another image.
        boxes = self.crop_boxes(images, rng)
        flips = rng.random(len(images)) < 0.5
        jitter = rng.uniform(-1, 1, (len(images), 4)) * self.colour_jitter
        batch = torch.stack([self.cut(*each) for each in zip(images, named, boxes, flips, strict=True)])
        batch = batch.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return self.normalise(torch.stack([change_colours(*each) for each in zip(batch, named, jitter, strict=True)]))

    def normalise(self, batch: Tensor) -> Tensor:
        """(B, 3, S, S) in 0..1 → zero mean, unit variance as the model expects; in place."""
        return batch.sub_(self.mean).div_(self.std)

    def plain(self, images: Sequence[np.ndarray]) -> Tensor:
        """(B, 3, S, S) in 0..1. Images that have the right size, such as the shapes world's, are only stacked."""
        size = (self.image_size, self.image_size, 3)
        images = [image if image.shape == size else self.centre(image) for image in images]
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return batch.to(torch.float32, memory_format=torch.contiguous_format).div_(255)

    def centre(self, image: np.ndarray) -> np.ndarray:
        from minivlm._torchvision import functional as F

        H, W = image.shape[:2]
        most = 16 * min(H, W)  # of a line of pixels only the middle is used, and the whole would fill the memory
        image = image[max(0, (H - most) // 2) :][:most, max(0, (W - most) // 2) :][:, :most]
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        pixels = F.resize(pixels, [self.image_size], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(pixels, [self.image_size]).permute(1, 2, 0).numpy()

    def crop_boxes(self, images: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
        """(B, 4) int64: top, left, height, width of a random crop of each image.

        Of ten candidates the first that fits into the image is taken; if none does (a panorama), the largest centred
        box with a permitted ratio, as in torchvision's RandomResizedCrop.
        """
        sizes = np.array([image.shape[:2] for image in images])
        H, W = sizes[:, :1], sizes[:, 1:]  # (B, 1)
        area = H * W * rng.uniform(*self.scale, (len(images), 10))
        ratio = np.exp(rng.uniform(log(self.ratio[0]), log(self.ratio[1]), (len(images), 10)))
        h, w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
        fits = (h <= H) & (w <= W)
        first = fits.argmax(axis=1)[:, None]
        h, w = np.take_along_axis(h, first, 1), np.take_along_axis(w, first, 1)
        where = rng.random((len(images), 2))
        none_fits = ~fits.any(axis=1, keepdims=True)
        h = np.where(none_fits, np.minimum(H, np.rint(W / self.ratio[0])), h)
        w = np.where(none_fits, np.minimum(W, np.rint(H * self.ratio[1])), w)
        where[none_fits[:, 0]] = 0.5
        top, left = np.floor(where[:, :1] * (H - h + 1)), np.floor(where[:, 1:] * (W - w + 1))
        return np.concatenate([top, left, h, w], axis=1).astype(np.int64)

    def cut(self, image: np.ndarray, named: set[str], box: np.ndarray, mirrored: bool) -> Tensor:
        """(H, W, 3) → (3, S, S) uint8: the crop, resized, perhaps mirrored."""
        from minivlm._torchvision import functional as F

        pixels = torch.from_numpy(image).permute(2, 0, 1)
        size = [self.image_size, self.image_size]
        how = {"interpolation": F.InterpolationMode.BICUBIC, "antialias": True}
        pixels = F.resize(pixels, size, **how) if named & PLACES else F.resized_crop(pixels, *box.tolist(), size, **how)
        may_flip = self.flip and not named & SIDES and not named & SIGNS and not any(word.isdigit() for word in named)
        return F.horizontal_flip(pixels) if mirrored and may_flip else pixels


def change_colours(image: Tensor, named: set[str], jitter: np.ndarray) -> Tensor:
    """(3, S, S) in 0..1 → the same with brightness, contrast, saturation and hue changed by `jitter` (4,)."""
    from minivlm._torchvision import functional as F

    brightness, contrast, saturation, hue = jitter.tolist()
    image = F.adjust_contrast(F.adjust_brightness(image, 1 + brightness), 1 + contrast)
    if named & COLOURS:
        return image
    if saturation:
        image = F.adjust_saturation(image, 1 + saturation)
    return F.adjust_hue(image, hue) if hue else image
