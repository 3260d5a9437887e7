"""Small models that speak: some as they are born, one that has learnt the names of three colours."""

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import torch

from minivlm import Flamingo, FlamingoConfig, LLaVA, LLaVAConfig, Processor
from minivlm.conversation import Turn, collate, encode_conversation, with_images
from minivlm.layers import LanguageModel, LanguageModelConfig, PerceiverConfig, VisionConfig
from minivlm.models.captioner import ImageCaptioningConfig, ImageCaptioningModel
from tests.colours import RGB

COLOURS = ("red", "green", "blue")
TEXTS = ["describe the picture.", "which colours?", "a picture of red", "and what else?", *COLOURS] * 4
VISION = VisionConfig(width=16, depth=2, heads=2, image_size=16, patch_size=8)
CONTEXT = 96


@cache
def tokenizer():
    return Processor.train(TEXTS, vocab_size=320, image_size=16, context=CONTEXT).tokenizer


def processor(**changes):
    """For 16-pixel pictures of four placeholders each."""
    config = Processor.train(["a"], vocab_size=260, image_size=16, context=CONTEXT).config
    return Processor(tokenizer(), replace(config, **{"image_tokens": 4, **changes}))


def language(**changes):
    ids = processor()
    fields = dict(
        width=32,
        depth=2,
        heads=2,
        vocab_size=ids.vocab_size,
        context=CONTEXT,
        end_tokens=(ids.end_token,),
        pad_token=ids.pad_token,
    )
    return LanguageModelConfig(**{**fields, **changes})


def llava_config(**changes):
    fields = dict(vision=VISION, language=language(), image_token=processor().image_token_id)
    return LLaVAConfig(**{**fields, **changes})


def llava(**changes):
    return LLaVA(llava_config(**changes)).eval()


def flamingo_config(**changes):
    resampler = PerceiverConfig(width=16, depth=1, heads=2, latents=2)
    fields = dict(vision=VISION, language=language(), resampler=resampler, image_token=processor().image_token_id)
    return FlamingoConfig(**{**fields, **changes})


def flamingo(**changes):
    return Flamingo(flamingo_config(**changes)).eval()


def captioner():
    return ImageCaptioningModel(ImageCaptioningConfig(vision=VISION, language=language())).eval()


def language_model():
    return LanguageModel(language()).eval()


def plain(colour):
    """A picture of one colour."""
    return np.full((16, 16, 3), RGB[colour], dtype=np.uint8)


def talks():
    """(colours shown, turns): captions, one question about one or two pictures, and a second picture later on."""
    for a in COLOURS:
        yield (a,), [Turn("user", with_images("describe the picture.")), Turn("assistant", f"a picture of {a}")]
        yield (a,), [Turn("user", with_images("which colours?")), Turn("assistant", a)]
    for a, b in product(COLOURS, COLOURS):
        yield (a, b), [Turn("user", with_images("which colours?", 2)), Turn("assistant", f"{a} {b}")]
        later = [Turn("user", with_images("and what else?")), Turn("assistant", b)]
        yield (a, b), [Turn("user", with_images("which colours?")), Turn("assistant", a), *later]


@cache
def colour_llava():
    """Says which colours it is shown, in their order. Trained in two seconds."""
    p, model = processor(), llava()
    samples = [(colours, encode_conversation(turns, p, images=len(colours))) for colours, turns in talks()]
    batch = collate([sample for _, sample in samples], p.pad_token)
    images = p.images([plain(colour) for colours, _ in samples for colour in colours])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = sum(model.losses(**batch, images=images).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


@cache
def colour_flamingo():
    """Goes on "a picture of" with the colour of the last picture before it. Trained in two seconds, as a whole."""
    p, model = processor(image_tokens=1), flamingo()
    documents = [colours for n in (1, 2, 3) for colours in product(COLOURS, repeat=n)]
    tokens, mask = p.text(["".join(f"<image>a picture of {colour}." for colour in colours) for colours in documents])
    images = p.images([plain(colour) for colours in documents for colour in colours])
    labels = tokens.masked_fill(~mask | (tokens == p.image_token_id), -100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = sum(model.losses(tokens, labels, images).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)
