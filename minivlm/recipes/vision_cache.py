"""The images of training samples or, where the vision tower is frozen, what it computed of each of them once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from minivlm.datasets.conversations import Conversations
from minivlm.layers.tower import ImageFeatures
from minivlm.models.vision_features import measure
from minivlm.processor import Processor
from minivlm.tasks.features import inference
from minivlm.training import autocast

LIMIT = 4 * 2**30  # bytes that may be kept
AT_A_TIME = 250  # images
MEASURED = 1000  # images that tell how large features are


class VisionCache:
    """indices of samples → {"images": …}, as batches want them.

    read: indices of samples → their images, in a row. single: each sample has one, so that their features can be kept.
    keep_pixels: where the tower learns, the pixels are kept, if they fit into memory.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        n: int,
        read: Callable[[Sequence[int]], list],
        *,
        single: bool = True,
        keep_pixels: bool = False,
    ):
        self.model, self.processor, self.n, self.read = model, processor, n, read
        self.single, self.keep_pixels = single, keep_pixels
        self.features: ImageFeatures | None = None
        self.pixels: Tensor | None = None

    @classmethod
    def of_conversations(cls, model: nn.Module, processor: Processor, conversations: Conversations) -> VisionCache:
        flat = lambda indices: [image for images in conversations.images(indices) for image in images]
        return cls(model, processor, len(conversations), flat, single=conversations.one_image_each)

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor | ImageFeatures]:
        """Nothing for samples without images."""
        for kept in (self.features, self.pixels):
            if kept is not None:
                return {"images": kept[torch.tensor(indices)]}
        images = self.read(indices)
        return {"images": self.processor.images(list(images))} if len(images) else {}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Standardise what the tower computes, where the model wants that; then compute or read what is to be kept."""
        self.measure(device, dtype)
        learns = any(p.requires_grad for p in self.model.vision.parameters())
        if self.single and not learns:
            self.compute(device, dtype)
        elif self.keep_pixels and 4 * 3 * self.n * self.processor.image_size**2 <= LIMIT:
            self.pixels = self.processor.images(self.read(range(self.n)))

    def measure(self, device: torch.device, dtype: torch.dtype) -> None:
        """A new model measures the first images, of which it standardises the features."""
        standardise = getattr(self.model, "standardise", None)
        if standardise is None or standardise.measured:
            return
        first = list(islice((image for i in range(self.n) for image in self.read([i])), MEASURED))
        if first:
            with inference(self.model), autocast(device, dtype):
                measure(self.model, self.processor.images(first).to(device))

    def compute(self, device: torch.device, dtype: torch.dtype) -> None:
        """(n, N, C) on the CPU, unless that is more than LIMIT."""
        from tqdm import tqdm

        features = None
        with inference(self.model), autocast(device, dtype):
            for i in tqdm(range(0, self.n, AT_A_TIME), desc="image features", unit=" batches", leave=False):
                indices = range(i, min(i + AT_A_TIME, self.n))
                images = self.processor.images(list(self.read(indices))).to(device)
                found = self.model.image_features(images)  # (b · views, N, C)
                found = found.reshape(len(indices), -1, found.shape[-1]).to("cpu", dtype)
                if features is None:
                    if self.n * found[0].nbytes > LIMIT:
                        return
                    features = torch.empty(self.n, *found.shape[1:], dtype=dtype)
                features[i : i + AT_A_TIME] = found
        self.features = ImageFeatures(features)
