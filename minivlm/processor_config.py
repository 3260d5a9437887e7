"""The settings of a processor, for images and for texts, as one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minivlm.chat_templates import ChatTemplate

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    image_size: int = 224  # pixels a side of what comes out
    pad_color: tuple[int, int, int] | None = None  # an image is set into the middle of a square of it; None: it is not
    resize: Literal["shortest", "squash", "none"] = "shortest"  # the shorter side alone, or both sides
    resize_to: int | None = None  # pixels; None: image_size
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic"
    crop: Literal["floor", "round", "none"] = "floor"  # how half a pixel is rounded: transformers' way, torchvision's
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    context: int = 77  # tokens the model can read
    pad_token: int | str = 0  # an id, or the token that has it
    pad_to_context: bool = False  # SigLIP reads its padding, so it always needs all of it
    image_token: str = "<image>"  # stands for an image in a text
    image_tokens: int = 0  # placeholders that it becomes, one for each feature of an image; 0: it stays one token
    image_fence: str | None = (
        None  # a token before and after the placeholders of an image, once between two images (IDEFICS)
    )
    chat: Literal[  # see `minivlm.chat_templates`; "unknown": the model's own is none that can be followed
        "plain",
        "vicuna",
        "chatml",
        "llama-2",
        "llama-3",
        "zephyr",
        "mistral",
        "gemma",
        "encoder",
        "blip2",
        "idefics",
        "idefics-instruct",
        "openflamingo",
        "own",
        "unknown",
    ] = "plain"
    chat_format: ChatTemplate | None = None  # chat="own": what the model was published with
    system: str | None = None  # the system text of a conversation without a system's turn; None: as the template says
    answer_end: int | None = None  # the model's end token, where the tokeniser puts none behind a text
    tidy: bool = False  # decoded text has no space before . , ? ! and around ' (tokenisers that split them off)
    tiles: int = 1  # n: an image is given whole, and again n times as large in n × n tiles (LLaVA-NeXT's AnyRes)

    def __post_init__(self):
        squashed = self.resize == "squash" and self.resize_to in (None, self.image_size)
        if self.tiles > 1 and not squashed and "none" in (self.resize, self.crop):
            raise ValueError("tiles need images of one size: resize to the shortest side and crop, or squash")
