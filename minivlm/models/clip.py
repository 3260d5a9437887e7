"""CLIP: two encoders, one shared space.

    images ─→ vision tower ─→ projection ─→ unit length ─┐
                                                         ├─ scale · cos (+ bias) ─→ (B, B)
    texts  ─→ text tower   ─→ projection ─→ unit length ─┘

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figures 1 and 3.
SigLIP (Zhai et al. 2023) is the same with the sigmoid loss, attention pooling and a bidirectional text tower. ALIGN (Jia et
al. 2021, "Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision") is the same with an
EfficientNet and a BERT; many of the captions that it learns from are wrong, which its smoothed labels allow for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm.layers.bert import BERT, BERTConfig
from minivlm.layers.efficientnet import EFFICIENTNET_SIZES
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.resnet import RESNET_SIZES
from minivlm.layers.text import TextConfig, TextTransformer
from minivlm.layers.tower import ImageFeatures, Images, TowerConfig, initialise_tower, new_tower
from minivlm.layers.vit import VIT_SIZES, VisionConfig
from minivlm.losses import CLIPLoss, backward_with_gradient_cache
from minivlm.model import Model
from minivlm.models.own_modules import OwnText, OwnTower, describe, either, text_states


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    vision: TowerConfig | OwnTower | None  # None: it is given ready, as vision=my_tower
    text: TextConfig | BERTConfig | OwnText  # of a BERT the first token is the pooled text
    embed_width: int = 512
    image_projection: bool = True  # False: the tower's vector already lives in the shared space (ResNet, SigLIP, ALIGN)
    patch_mean: bool = False  # beside the tower's vector stands the mean of its patches, as in DINOv2's linear probes
    text_projection_bias: bool = False
    loss: Literal["softmax", "sigmoid"] = "softmax"
    loss_chunk: int | None = None  # rows of the similarity matrix held at a time; None: all
    label_smoothing: float = 0.0  # of the softmax: this share of the truth is spread over the whole batch
    # Where the temperature starts. None: CLIP's 0.07 (its §2.5), with the sigmoid SigLIP's 0.1 (its §3.2, as the bias)
    initial_temperature: float | None = None
    initial_bias: float = -10.0  # of the sigmoid's logits, where it starts

    def __post_init__(self):
        if self.initial_temperature is not None and not 0 < self.initial_temperature < math.inf:
            raise ValueError(f"initial_temperature is {self.initial_temperature}, but must be above 0")
        if not math.isfinite(self.initial_bias):
            raise ValueError(f"initial_bias is {self.initial_bias}, but must be a finite number")
        out = self.embed_width if self.vision is None else self.vision_width
        if self.patch_mean and not (isinstance(self.vision, VisionConfig) and self.vision.pool == "class"):
            raise ValueError(
                "patch_mean needs a ViT with a class token, beside which the mean of the patches can stand"
            )
        if not self.image_projection and out != self.embed_width:
            raise ValueError(f"without image_projection the tower's width {out} must be embed_width {self.embed_width}")

    @property
    def vision_width(self) -> int:
        """Of what the projection reads of an image."""
        return self.vision.output_width * (2 if self.patch_mean else 1)


def clip_size(name: str) -> CLIPConfig:
    """The published sizes: "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-H/14", "RN50", …  Radford et al. 2021, tables 19, 20."""
    embed = {"ViT-B/32": 512, "ViT-B/16": 512, "ViT-L/14": 768, "ViT-H/14": 1024}
    widths = {"ViT-L/14": 768, "ViT-H/14": 1024, "RN50x4": 640, "RN50x16": 768, "RN50x64": 1024}
    width, quick = (
        widths.get(name, 512),
        name != "ViT-H/14",
    )  # OpenAI's weights use quick_gelu, LAION's H/14 the exact one
    text = TextConfig(
        width=width,
        depth=24 if name == "ViT-H/14" else 12,
        heads=width // 64,
        activation="quick_gelu" if quick else "gelu",
        pool="argmax",
    )
    if name in RESNET_SIZES:
        vision = RESNET_SIZES[name]
        return CLIPConfig(vision=vision, text=text, embed_width=vision.output_width, image_projection=False)
    if name not in embed:
        raise ValueError(f"unknown size {name!r}; there are {', '.join([*embed, *RESNET_SIZES])}")
    vision = replace(VIT_SIZES[name.removeprefix("ViT-")], activation=text.activation)
    return CLIPConfig(vision=vision, text=text, embed_width=embed[name])


def align_size(name: str = "B7") -> CLIPConfig:
    """EfficientNet "B0" … "B7" with a BERT-base; B7 at 289 pixels is kakaobrain/align-base. Jia et al. 2021, §5."""
    if name not in EFFICIENTNET_SIZES:
        raise ValueError(f"unknown size {name!r}; there are {', '.join(EFFICIENTNET_SIZES)}")
    vision = replace(EFFICIENTNET_SIZES[name], image_size=289)
    return CLIPConfig(
        vision=vision,
        text=BERTConfig(vocab_size=30522, width=768, depth=12, heads=12),
        embed_width=vision.output_width,
        image_projection=False,
        text_projection_bias=True,
        label_smoothing=0.1,
        initial_temperature=1.0,
    )


TRANSFORMERS_NAMES = {"get_image_features": "encode_image(images)", "get_text_features": "encode_text(tokens, mask)"}


@dataclass(frozen=True)
class CLIPOutput:
    loss: Tensor  # NaN where there are not as many texts as images
    image_features: Tensor  # (B, E), unit length
    text_features: Tensor
    similarity: CLIPLoss

    @cached_property
    def logits_per_image(self) -> Tensor:
        """(B, B'): row i scores every text for image i; computed when it is asked for, which training never does."""
        return self.similarity.logits(self.image_features, self.text_features)

    @property
    def logits_per_text(self) -> Tensor:
        return self.logits_per_image.T


class CLIP(Model):
    """images (B, 3, H, W), tokens (B, T), mask (B, T) → `CLIPOutput`.

    vision, text: modules of your own, see own_modules.py.
    """

    config_class = CLIPConfig
    image_attention = "pooling"

    @property
    def abilities(self) -> frozenset[str]:
        return frozenset({"encode", "attend"} if self.image_attention else {"encode"})

    def __init__(
        self, config: CLIPConfig, *, vision: nn.Module | None = None, text: nn.Module | None = None, seed: int = 0
    ):
        super().__init__(describe(config, vision=vision, text=text))
        c = self.config
        self.vision = either(vision, new_tower, c.vision)
        make_text = partial(BERT, seed=seed) if isinstance(c.text, BERTConfig) else TextTransformer
        self.text = either(text, make_text, c.text)
        self.image_projection = (
            nn.Linear(c.vision_width, c.embed_width, bias=False) if c.image_projection else nn.Identity()
        )
        self.text_projection = nn.Linear(c.text.width, c.embed_width, bias=c.text_projection_bias)
        temperature = c.initial_temperature or (0.1 if c.loss == "sigmoid" else 0.07)
        self.loss = CLIPLoss(
            c.loss, temperature=temperature, bias=c.initial_bias, chunk=c.loss_chunk, smoothing=c.label_smoothing
        )
        initialise(self, torch.Generator().manual_seed(seed), own=(vision, text))
        if isinstance(c.vision, OwnTower):
            self.image_attention = None  # nobody knows where it pools

    def __getattr__(self, name: str) -> Any:
        if name in TRANSFORMERS_NAMES:
            raise AttributeError(f"CLIP has no {name}: call {TRANSFORMERS_NAMES[name]}, which gives unit vectors")
        return super().__getattr__(name)

    def forward(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> CLIPOutput:
        image_features = self.encode_image(images)
        text_features = self.encode_text(tokens, mask)
        paired = len(image_features) == len(text_features)
        loss = self.loss(image_features, text_features) if paired else torch.tensor(math.nan)
        return CLIPOutput(loss, image_features, text_features, self.loss)

    def encode_image(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, E), unit length."""
        return F.normalize(self.image_projection(self.image_features(images)[:, 0]), dim=-1)

    def image_features(self, images: Images) -> Tensor:
        """(B, 3, H, W) → (B, 1, C): the vector that the projection reads of an image."""
        if isinstance(images, ImageFeatures):
            return images.tensor
        if not self.config.patch_mean:
            return self.vision(images)[:, None]
        x = self.vision.norm(self.vision.features(images))
        return torch.cat([x[:, 0], x[:, self.vision.leading :].mean(dim=1)], dim=-1)[:, None]

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, E), unit length."""
        vector = self.text.first if isinstance(self.text, BERT) else partial(text_states, self.text)
        return F.normalize(self.text_projection(vector(tokens, mask)), dim=-1)

    def probabilities(self, image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
        """(N, E), (M, E) → (N, M): how probable each text is for each image, with the softmax loss among the M texts."""
        logits = self.loss.logits(image_vectors, text_vectors)
        return logits.sigmoid() if self.config.loss == "sigmoid" else logits.softmax(dim=1)

    def losses(self, images: Images, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The terms of the training loss, by name, as `forward` gives them."""
        return {"contrast": self(images, tokens, mask).loss}

    def backward_in_parts(self, batch: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """The gradients of the whole batch's loss from `size` samples at a time; see `backward_with_gradient_cache`."""
        self.check_parts(len(batch["tokens"]), size)
        inputs = ((batch["images"],), (batch["tokens"], batch["mask"]))
        encoders = (self.encode_image, self.encode_text)
        return {"contrast": backward_with_gradient_cache(encoders, inputs, self.loss, chunk=size)}

    def chance_losses(self, batch_size: int) -> dict[str, float]:
        """The losses of a model that knows nothing: ln B for the softmax; no such level exists for the sigmoid."""
        return {"contrast": math.log(batch_size)} if self.config.loss == "softmax" else {}


@torch.no_grad()
def initialise(model: CLIP, generator: torch.Generator, own: tuple[nn.Module | None, ...] = ()) -> None:
    """CLIP's initialisation (OpenAI's released model.py), the same for both transformers. own: modules that stay as they are.

    | tensor                              | normal, mean 0, standard deviation     |
    |-------------------------------------|----------------------------------------|
    | token embedding, text positions     | 0.02, 0.01                             |
    | the vision tower's own              | see `initialise_tower`                 |
    | linear layers, other convolutions   | see `initialise_linears`               |

    Norms are one.
    """
    initialise_linears(nn.ModuleList(part for part in model.children() if part not in own), generator)
    if isinstance(model.text, TextTransformer) and model.text not in own:  # a BERT has initialised its own
        normal(model.text.token_embedding.weight, 0.02, generator)
        normal(model.text.position_embedding, 0.01, generator)
    if model.vision not in own:
        initialise_tower(model.vision, generator)
