"""Contrast with momentum encoders: a slowly moving copy of the encoders gives soft labels, and a queue of its last vectors
gives every image many more texts to choose from than its batch.

    images, texts ─→ the model ─→ vectors ──────────────────┬─→ logits ─→ cross-entropy
                  └→ its copy  ─→ vectors ─┬→ and the queue ┘                  ▲
                                           └→ softmax, mixed with the truth ───┘

Li et al. 2021, "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation" (ALBEF), §3.2
and §3.3; the queue: He et al. 2020, "Momentum Contrast", §3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.tower import Images
from minivlm.losses import first_row, full_precision, gather
from minivlm.models.vision_features import vision_features

COPIED = ("vision", "encoder", "vision_projection", "text_projection")


@dataclass(frozen=True)
class MomentumConfig:
    """The defaults are those of BLIP, whose queue is one of 57,600."""

    queue: int = 4096  # images and texts in the queue, a multiple of the batch
    rate: float = 0.995  # share of its weights that the copy keeps in every step
    soft: float = 0.4  # share of the copy's softmax in the labels …
    # … to which it grows from 0 over so many images. None: two epochs, where a recipe knows how many that is.
    ramp: int | None = field(default=None, metadata={"before": 0})

    def __post_init__(self):
        if not (0 <= self.soft <= 1 and 0 <= self.rate <= 1 and (self.ramp or 0) >= 0):
            raise ValueError(f"soft {self.soft} and rate {self.rate} must be from 0 to 1, ramp {self.ramp} at least 0")

    def over(self, images: int) -> MomentumConfig:
        """The config for so many training images: unless it is given, the ramp is two epochs, as BLIP's."""
        return replace(self, ramp=2 * images) if self.ramp is None else self

    def check_batch(self, batch_size: int) -> None:
        """ValueError unless whole batches (of all processes together) fill the queue."""
        if batch_size > self.queue or self.queue % batch_size:
            raise ValueError(f"a momentum queue of {self.queue} is not a multiple of the batch of {batch_size}")


class Momentum(nn.Module):
    """The momentum encoders and queue of a model that has the parts COPIED, `scale()`, `standardise` and `pool`.

    embed_width: E, of the vectors that are compared.
    """

    follows = True  # its weights change without gradients (see `minivlm.precision`)

    def __init__(self, config: MomentumConfig, model: nn.Module, embed_width: int):
        super().__init__()
        self.config = config
        self.copies = nn.ModuleDict({name: deepcopy(getattr(model, name)) for name in COPIED}).requires_grad_(False)
        self.register_buffer("images", torch.zeros(config.queue, embed_width))
        self.register_buffer("texts", torch.zeros(config.queue, embed_width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # images so far, in all

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """θ' ← rate · θ' + (1 − rate) · θ; buffers (batch norm's) are copied."""
        for name, copy in self.copies.items():
            part = getattr(model, name)
            for slow, fast in zip(copy.parameters(), part.parameters(), strict=True):
                slow.lerp_(fast, 1 - self.config.rate)
            for slow, fast in zip(copy.buffers(), part.buffers(), strict=True):
                slow.copy_(fast)

    def vectors(self, model: nn.Module, images: Images, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The copy's vectors of images and of texts: (B, E) each, unit length. `ImageFeatures` are the model's own tower's."""
        pooled = model.pooled_features(vision_features(images, self.copies["vision"], model.standardise, model.config))
        images = self.copies["vision_projection"](pooled)
        texts = self.copies["text_projection"](self.copies["encoder"](tokens, mask).hidden[:, 0])
        return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)

    def contrast(
        self,
        model: nn.Module,
        image_vectors: Tensor,
        text_vectors: Tensor,
        images: Images,
        tokens: Tensor,
        mask: Tensor,
        split: Callable,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The contrastive loss of vectors (B, E) of the model, and the logits both ways among the batches of all processes
        (B, W·B).

        A label is soft · the softmax of the copy + (1 − soft) · the truth (ALBEF, equation 6; soft grows, see `softness`).
        In training the copy follows the model first, and the queue takes its vectors afterwards. split: see `in_parts`.
        """
        with torch.no_grad():
            if self.training:
                self.follow(model)
            slow_images, slow_texts = split(partial(self.vectors, model), images, tokens, mask)
        scale = model.scale()
        all_images, all_texts = gather(slow_images), gather(slow_texts)
        to_texts, loss_texts = self.one_way(image_vectors, slow_images, torch.cat([all_texts, self.texts]), scale)
        to_images, loss_images = self.one_way(text_vectors, slow_texts, torch.cat([all_images, self.images]), scale)
        if self.training:
            self.enqueue(all_images, all_texts)
        n = len(all_images)
        return (loss_texts + loss_images) / 2, to_texts[:, :n].detach(), to_images[:, :n].detach()

    def one_way(self, fast: Tensor, slow: Tensor, others: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, E) against all others (W·B + queue, E) → logits and loss. Rows of the queue that are empty do not count."""
        with full_precision(fast.device):
            logits, target = (scale * x.float() @ others.float().T for x in (fast, slow))
        empty = torch.arange(len(others), device=fast.device) >= len(others) - len(self.texts) + self.seen
        logits, target = (x.masked_fill(empty, torch.finfo(x.dtype).min) for x in (logits, target))
        own = first_row(len(fast)) + torch.arange(len(fast), device=fast.device)
        truth = F.one_hot(own, len(others))
        labels = torch.lerp(truth.float(), target.softmax(dim=1), self.softness()).detach()
        return logits, F.cross_entropy(logits, labels)

    def softness(self) -> Tensor:
        """The share of the copy's softmax in the labels, which grows from 0 (ALBEF, BLIP: released code)."""
        c = self.config
        return c.soft * (self.seen / c.ramp if c.ramp else torch.ones_like(self.seen)).clamp(max=1.0)

    @torch.no_grad()
    def enqueue(self, images: Tensor, texts: Tensor) -> None:
        """Vectors (W·B, E) replace the oldest of the queue."""
        n, size = len(images), self.config.queue
        self.config.check_batch(n)
        rows = (self.seen + torch.arange(n, device=images.device)) % size
        self.images[rows], self.texts[rows] = images.float(), texts.float()
        self.seen += n
