"""A model that matches pictures of the shapes world without a mistake, and compares them by their colours alone."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minivlm.datasets.shapes.negatives import agrees
from minivlm.datasets.shapes.scenes import COLOURS
from minivlm.datasets.shapes.text import parse
from minivlm.layers.tower import ImageFeatures


class Oracle(nn.Module):
    """features (B, 1, 1): which scene a picture shows. It reads tokens as their processor numbers them."""

    device, dtype = torch.device("cpu"), torch.float32
    abilities, takes_images = frozenset({"encode", "match"}), True

    def __init__(self, worlds, processor):
        super().__init__()
        self.config = SimpleNamespace()
        self.turn = nn.Parameter(torch.eye(len(COLOURS)))
        self.processor, self.matched, self.looked = processor, 0, 0
        self.scenes, self.number = [], {}
        for world in worlds:
            for scene, pixels in zip(world.scenes.read(np.arange(len(world))), world.pixels, strict=True):
                self.number[pixels.tobytes()] = len(self.scenes)
                self.scenes.append(scene.objects)

    def image_features(self, images):
        if isinstance(images, ImageFeatures):
            return images.tensor
        self.looked += len(images)
        pixels = images.permute(0, 2, 3, 1).to(torch.uint8).numpy()
        return torch.tensor([self.number[image.tobytes()] for image in pixels], dtype=torch.float32).view(-1, 1, 1)

    def shown(self, features):
        return [self.scenes[int(number)] for number in features.flatten()]

    def colours(self, many):
        counts = [[1e-3 + sum(thing.colour == c for thing in objects) for c in COLOURS] for objects in many]
        return F.normalize(torch.tensor(counts) @ self.turn, dim=-1)

    def encode_image(self, images):
        """Two queries, of which the second one is blind."""
        seen = self.colours(self.shown(self.image_features(images)))
        return torch.stack([seen, F.normalize(torch.ones_like(seen), dim=-1)], dim=1)

    def encode_text(self, tokens, mask):
        return self.colours([parse(text) for text in self.processor.read(tokens, mask)])

    def similarity(self, images, texts):
        return (images @ texts.T).amax(dim=1)

    def match(self, images, tokens, mask):
        self.matched += len(tokens)
        assert mask[:, -1].any()  # no more padding than the longest needs
        many = self.shown(self.image_features(images))
        texts = self.processor.read(tokens, mask)
        fits = [
            all(any(agrees(said, thing) for thing in objects) for said in parse(text))
            and len(parse(text)) == len(objects)
            for objects, text in zip(many, texts, strict=True)
        ]
        return torch.tensor([[-1.0, 1.0] if yes else [1.0, -1.0] for yes in fits])


class WordProcessor:
    """A word is a token, numbered as it comes; pictures stay as they are."""

    context, image_size = 64, 32

    def __init__(self):
        self.config = SimpleNamespace()
        self.words = ["<pad>"]

    def images(self, images):
        from PIL import Image

        arrays = [np.asarray(Image.open(i).convert("RGB") if not isinstance(i, np.ndarray) else i) for i in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()

    def text(self, texts, *, cut=False):
        rows = [text.replace(",", " ,").split() for text in texts]
        self.words += dict.fromkeys(word for row in rows for word in row if word not in self.words)
        T = max(map(len, rows))
        tokens = torch.tensor([[self.words.index(word) for word in row] + [0] * (T - len(row)) for row in rows])
        return tokens, tokens > 0

    def read(self, tokens, mask):
        return [" ".join(self.words[i] for i in row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]
