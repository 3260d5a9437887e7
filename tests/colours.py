"""A model whose right answers are known: an image is its mean colour, a text the sum of its colour words."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minivlm.datasets.images import read_image
from minivlm.losses import CLIPLoss

RGB = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255, 255, 255)}
WORDS = ["<pad>", "<other>", *RGB]


class ColourModel(nn.Module):
    """encode_image: mean colour → (B, 4); encode_text: sum of its words' colours → (B, 4). `calls` counts images."""

    device, dtype = torch.device("cpu"), torch.float32
    abilities, takes_images = frozenset({"encode"}), True

    def __init__(self, loss: str = "softmax"):
        super().__init__()
        self.config = SimpleNamespace(loss=loss)
        self.loss = CLIPLoss(loss, temperature=0.1, bias=-5.0)
        self.words = nn.Embedding.from_pretrained(torch.tensor([(0, 0, 0), (0, 0, 0), *RGB.values()]) / 255)
        self.turn = nn.Parameter(torch.eye(3, 4))
        self.calls = 0

    def encode_image(self, images):
        self.calls += len(images)
        return F.normalize(images.mean(dim=(2, 3)) @ self.turn + 0.01, dim=-1)

    def probabilities(self, images, texts):
        logits = self.loss.logits(images, texts)
        return logits.sigmoid() if self.config.loss == "sigmoid" else logits.softmax(dim=1)

    def encode_text(self, tokens, mask):
        return F.normalize((self.words(tokens) * mask[..., None]).sum(dim=1) @ self.turn + 0.01, dim=-1)


class ColourProcessor:
    context = 12

    def __init__(self, size: int = 8):
        self.config = SimpleNamespace(image_size=size)
        self.image_size = size

    def images(self, images):
        def pixels(image):
            if not isinstance(image, (Image.Image, np.ndarray)):
                image = read_image(image)
            image = image if isinstance(image, Image.Image) else Image.fromarray(image)
            return torch.from_numpy(np.array(image.resize((self.image_size, self.image_size)))).permute(2, 0, 1) / 255

        return torch.stack([pixels(image) for image in images])

    def text(self, texts, *, cut=False):
        rows = [[WORDS.index(word) if word in WORDS else 1 for word in text.strip(".").split()] for text in texts]
        rows = [row[: self.context] if cut else row for row in rows]
        T = max(len(row) for row in rows)
        tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
        return tokens, tokens > 0


def paint(path, colour, size=(10, 6)):
    """A picture of one colour ("red" or three numbers); returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, RGB.get(colour, colour)).save(path)
    return path
