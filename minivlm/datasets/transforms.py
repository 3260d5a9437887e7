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
from functools import lru_cache
from math import log
from sys import getrefcount
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

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


class Allowed(NamedTuple):
    """What may be done to an image."""

    flip: bool
    crop: bool
    recolour: bool


@lru_cache(maxsize=2**17)  # epoch after epoch reads the same captions
def allowed(caption: str) -> Allowed:
    """What leaves a caption true; where it is not recognised as English, nothing."""
    if not is_english(caption, GUARDED):
        return Allowed(False, False, False)
    named = words(caption)
    flip = SIDES.isdisjoint(named) and SIGNS.isdisjoint(named) and not any(word.isdigit() for word in named)
    return Allowed(flip, PLACES.isdisjoint(named), COLOURS.isdisjoint(named))


class Buffers:
    """Memory of batches that nobody holds any more, for the next ones: a system that hands out 38 MB anew takes longer for it
    than all the arithmetic on the images.

    A tensor holds the array that it was made from for as long as it, a view of it or what autograd keeps of it lives.
    """

    KEPT = 4

    def __init__(self):
        self.arrays: list[np.ndarray] = []
        self.lock = Lock()

    def take(self, *shape: int) -> Tensor:
        with self.lock:
            for i in range(len(self.arrays)):
                if self.arrays[i].shape == shape and getrefcount(self.arrays[i]) == 2:  # the list's and the argument
                    return torch.from_numpy(self.arrays[i])
            self.arrays = [*self.arrays[1 - self.KEPT :], np.empty(shape, dtype=np.float32)]
            return torch.from_numpy(self.arrays[-1])


DRAWS = 10 + 10 + 2 + 1 + 4  # areas and ratios of crops, where they lie, mirror, colours


class TrainTransform:
    """transform(images, captions, rng) → (B, 3, S, S) float32, (pixels / 255 − mean) / std.

    images         B arrays (H, W, 3) uint8
    rngs           the only source of chance, a generator for each image: its state gives the same bytes, in any thread and
                   whatever the other images are
    flip           mirror half of the images
    colour_jitter  brightness, contrast, saturation and hue, each changed by at most this much (0.2: factors 0.8 to 1.2)
    scale, ratio   share of the area that a crop keeps, and its width / height (Szegedy et al. 2015, §6)
    augment        False: no chance, `rngs` may be None; the shorter side is resized to S and the centre square taken
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
        self.buffers = Buffers()

    def __call__(
        self, images: Sequence[np.ndarray], captions: Sequence[str], rngs: Sequence[np.random.Generator] | None
    ) -> Tensor:
        if not self.augment:
            return self.normalise(self.plain(images))
        # Every image takes the same draws whatever its caption is: DRAWS numbers in 0..1.
        drawn = np.stack([rng.random(DRAWS) for rng in rngs])
        areas, ratios, where, mirrored, jitter = np.split(drawn, [10, 20, 22, 23], axis=1)
        boxes = self.crop_boxes([image.shape[:2] for image in images], areas, ratios, where).tolist()
        mirrored, jitter = (mirrored[:, 0] < 0.5).tolist(), (jitter * 2 - 1) * self.colour_jitter
        batch = self.buffers.take(len(images), 3, self.image_size, self.image_size)
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            may = allowed(caption)
            pixels = self.cut(image, boxes[i] if may.crop else None)
            pixels = pixels.flip(-1) if mirrored[i] and may.flip and self.flip else pixels
            one = batch[i].copy_(pixels).div_(255)  # an image after the other: it stays in the processor's cache
            self.normalise(change_colours(one, jitter[i].tolist(), recolour=may.recolour))
        return batch

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

    def crop_boxes(
        self, sizes: Sequence[tuple[int, int]], areas: np.ndarray, ratios: np.ndarray, where: np.ndarray
    ) -> np.ndarray:
        """(B, 4) int64: top, left, height, width of a random crop of each image. areas, ratios (B, 10), where (B, 2): in 0..1.

        Of ten candidates the first that fits into the image is taken; if none does (a panorama), the largest centred
        box with a permitted ratio, as in torchvision's RandomResizedCrop.
        """
        sizes = np.array(sizes)
        H, W = sizes[:, :1], sizes[:, 1:]  # (B, 1)
        (least, most), (narrow, wide) = self.scale, map(log, self.ratio)
        area = H * W * (least + (most - least) * areas)
        ratio = np.exp(narrow + (wide - narrow) * ratios)
        h, w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
        fits = (h <= H) & (w <= W)
        first = fits.argmax(axis=1)[:, None]
        h, w = np.take_along_axis(h, first, 1), np.take_along_axis(w, first, 1)
        none_fits = ~fits.any(axis=1, keepdims=True)
        h = np.where(none_fits, np.minimum(H, np.rint(W / self.ratio[0])), h)
        w = np.where(none_fits, np.minimum(W, np.rint(H * self.ratio[1])), w)
        where = np.where(none_fits, 0.5, where)
        top, left = np.floor(where[:, :1] * (H - h + 1)), np.floor(where[:, 1:] * (W - w + 1))
        return np.concatenate([top, left, h, w], axis=1).astype(np.int64)

    def cut(self, image: np.ndarray, box: Sequence[int] | None) -> Tensor:
        """(H, W, 3) → (3, S, S) uint8: the crop, or all of the image, resized. What torchvision's resized_crop gives."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        if box is not None:
            top, left, height, width = box
            pixels = pixels[:, top : top + height, left : left + width]
        size = (self.image_size, self.image_size)
        if pixels.shape[1:] == size:
            return pixels
        return interpolate(pixels[None], size=size, mode="bicubic", align_corners=False, antialias=True)[0]


GRAY = (0.2989, 0.587, 0.114)  # as in torchvision


def change_colours(image: Tensor, jitter: Sequence[float], *, recolour: bool = True) -> Tensor:
    """(3, S, S) in 0..1 → the same, in place, with brightness, contrast, saturation and hue changed by `jitter` (4,); without
    `recolour` only the first two. Torchvision's adjust_brightness and so on, to the bit, without a copy for each.
    """
    brightness, contrast, saturation, hue = jitter
    image.mul_(1 + brightness).clamp_(0, 1)
    blend(image, gray(image).mean(dim=(-3, -2, -1), keepdim=True), 1 + contrast)
    if recolour and saturation:
        blend(image, gray(image), 1 + saturation)
    if recolour and hue:
        from minivlm._torchvision import functional as F

        image.copy_(F.adjust_hue(image, hue))
    return image


def gray(image: Tensor) -> Tensor:
    """(3, S, S) → (1, S, S)"""
    red, green, blue = image
    return red.mul(GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])[None]


def blend(image: Tensor, other: Tensor, share: float) -> None:
    """share · image + (1 − share) · other, in place, clipped."""
    image.mul_(share).add_(other, alpha=1.0 - share).clamp_(0, 1)
