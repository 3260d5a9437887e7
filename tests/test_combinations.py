"""Any encoder, with any connector, with any language model: what goes together learns, is stored, and speaks as before.

|            | LanguageModel                  | T5                                                      |
|------------|--------------------------------|---------------------------------------------------------|
| in front   | captioner                      | no: it does not go on from what stands before           |
| linear     | LLaVA                          | no: the same                                            |
| MLP        | LLaVA                          | no: the same                                            |
| Q-Former   | BLIP-2                         | BLIP-2: its encoder reads the queries                   |
| resampler  | LLaVA                          | no: the same                                            |
| gated      | Flamingo, behind a resampler   | no: its gated layers stand between a decoder's blocks   |
"""

import json
from dataclasses import replace

import pytest
import torch

from minivlm import (
    BLIP2,
    BLIP2Config,
    Flamingo,
    FlamingoConfig,
    ImageCaptioningConfig,
    ImageCaptioningModel,
    LLaVA,
    LLaVAConfig,
    checkpoint,
    config,
)
from minivlm.errors import UserError
from minivlm.layers import EfficientNetConfig, PerceiverConfig, QFormerConfig, ResNetConfig, T5Config, VisionConfig
from minivlm.layers.tower import learned_positions
from minivlm.testing import assert_gradient_reaches
from tests.speakers import language, processor

PLACEHOLDER, VOCAB = processor().image_token_id, processor().vocab_size
TOWERS = {
    "vit": VisionConfig(width=16, depth=2, heads=2, image_size=32, patch_size=16),
    "resnet": ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=32),
    "efficientnet": EfficientNetConfig(
        image_size=32,
        stem_channels=8,
        channels=(8, 16, 24),
        blocks=(1, 1, 1),
        kernels=(3, 3, 3),
        strides=(2, 2, 2),
        expansions=(1, 2, 2),
    ),
}
LANGUAGES = {
    "lm": language(),
    "t5": T5Config(width=32, depth=1, heads=2, vocab_size=VOCAB, end_tokens=(language().end_tokens[0],)),
}
LAYERS = (-2,)


def width_of(vision):
    return vision.features_at(LAYERS[0])[1]


def captioner(vision, words):
    return ImageCaptioningModel, ImageCaptioningConfig(vision=vision, language=words, vision_layer=-2)


def llava(projector, **changes):
    def build(vision, words):
        changed = dict(projector=projector, **changes)
        return LLaVA, LLaVAConfig(vision=vision, language=words, image_token=PLACEHOLDER, **changed)

    return build


def llava_of_latents(vision, words):
    positions = learned_positions(vision, LAYERS)
    sizes = dict(width=16, depth=1, heads=2, latents=3, context_width=width_of(vision), positions=positions)
    changes = dict(projector="resampler", resampler=PerceiverConfig(**sizes))
    return LLaVA, LLaVAConfig(vision=vision, language=words, image_token=PLACEHOLDER, **changes)


def llava_of_queries(vision, words):
    positions = learned_positions(vision, LAYERS)
    sizes = dict(width=16, depth=2, heads=2, queries=3, context_width=width_of(vision), positions=positions)
    changes = dict(projector="qformer", qformer=QFormerConfig(**sizes))
    return LLaVA, LLaVAConfig(vision=vision, language=words, image_token=PLACEHOLDER, **changes)


def blip2(vision, words):
    positions = learned_positions(vision, LAYERS)
    qformer = QFormerConfig(width=16, depth=2, heads=2, queries=3, context_width=width_of(vision), positions=positions)
    seeing = dict(vision=vision, vision_layers=LAYERS, class_token=False, vision_norm=False)
    return BLIP2, BLIP2Config(**seeing, qformer=qformer, language=words, image_token=PLACEHOLDER)


def flamingo(vision, words):
    resampler = PerceiverConfig(width=16, depth=1, heads=2, latents=3, context_width=width_of(vision))
    seeing = dict(vision=vision, vision_layers=LAYERS, class_token=False, vision_norm=False)
    return Flamingo, FlamingoConfig(**seeing, resampler=resampler, language=words, image_token=PLACEHOLDER)


CONNECTORS = {
    "in front": captioner,
    "linear": llava("linear"),
    "mlp": llava("mlp"),
    "pixel shuffle": llava("pixel_shuffle", pixel_shuffle=2),
    "resampler": llava_of_latents,
    "queries": llava_of_queries,
    "q-former": blip2,
    "gated": flamingo,
}
SUPPORTED = [
    (tower, connector, words)
    for tower in TOWERS
    for connector in CONNECTORS
    for words in LANGUAGES
    if words == "lm" or connector == "q-former"
]


def batch(model, words):
    """Two pictures, two texts in which they stand, and what is to be said."""
    tokens = torch.randint(4, 60, (2, 7))
    if not isinstance(model, ImageCaptioningModel):
        marks = torch.full((2, model.config.image_tokens), PLACEHOLDER)
        tokens = torch.cat([tokens[:, :1], marks, tokens[:, 1:]], dim=1)
    labels = tokens.masked_fill(tokens == PLACEHOLDER, -100) if words == "lm" else torch.randint(4, 60, (2, 5))
    return {"tokens": tokens, "labels": labels, "images": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize(("tower", "connector", "words"), SUPPORTED)
def test_learns_is_stored_and_speaks_as_before(tower, connector, words, tmp_path):
    model_class, built = CONNECTORS[connector](TOWERS[tower], LANGUAGES[words])
    model = model_class(built).train()
    given = batch(model, words)
    if connector == "gated":
        given["images"] = given["images"][:, None]  # one image a text
        torch.nn.init.ones_(model.gated[0].attention_gate)  # closed at first, it would keep all before it from learning
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = sum(model.losses(**given).values())
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[2] < losses[0]
    connected = next(getattr(model, name) for name in ("projector", "qformer", "resampler") if hasattr(model, name))
    assert any(p.grad is not None and p.grad.any() for p in connected.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.vision.parameters())

    model.eval().save_pretrained(tmp_path)
    back, _ = checkpoint.load(tmp_path)
    assert type(back) is model_class and back.config == built
    said = [m.generate(given["images"], given["tokens"], max_new_tokens=6) for m in (model, back)]
    assert torch.equal(*said)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(
    ("connector", "who"),
    [
        ("in front", "the captioner"),
        ("linear", "LLaVA"),
        ("mlp", "LLaVA"),
        ("resampler", "LLaVA"),
        ("gated", "Flamingo"),
    ],
)
def test_what_cannot_be_combined_says_why(tower, connector, who):
    with pytest.raises(
        ValueError,
        match=rf"{who} needs a decoder as its language model, .* a T5Config has an encoder as well",
    ):
        CONNECTORS[connector](TOWERS[tower], LANGUAGES["t5"])


@pytest.mark.parametrize("tower", ["resnet", "efficientnet"])
@pytest.mark.parametrize("connector", ["q-former", "gated"])
def test_convolutions_have_no_last_norm(tower, connector):
    _, built = CONNECTORS[connector](TOWERS[tower], LANGUAGES["lm"])
    with pytest.raises(ValueError, match="vision_norm needs a ViT"):
        replace(built, vision_norm=True)


@pytest.mark.parametrize("connector", ["q-former", "resampler", "gated"])
def test_a_reader_of_another_width(connector):
    _, built = CONNECTORS[connector](TOWERS["vit"], LANGUAGES["lm"])
    with pytest.raises(ValueError, match=r"the vision tower gives features of width 32, but the .* of width 16"):
        replace(built, vision=TOWERS["efficientnet"], vision_layers=(-2, -2))


def test_a_resampler_is_given_with_its_sizes():
    _, built = llava("mlp")(TOWERS["vit"], LANGUAGES["lm"])
    with pytest.raises(ValueError, match="projector is 'resampler', but resampler is None: the two go together"):
        replace(built, projector="resampler")
    with pytest.raises(ValueError, match="projector is 'mlp', but resampler is Perceiver"):
        replace(built, resampler=PerceiverConfig(width=16))


def test_a_stored_config_that_cannot_be_combined_is_a_sentence():
    _, built = llava("mlp")(TOWERS["vit"], LANGUAGES["lm"])
    values = json.loads(json.dumps(config.to_dict(built)))
    values["language"] = config.to_dict(LANGUAGES["t5"])
    with pytest.raises(UserError, match=r"config\.language"):
        config.from_dict(LLaVAConfig, values)


@pytest.mark.parametrize("tower", TOWERS)
def test_all_of_a_tower_is_asked_when_its_last_layer_is_read(tower):
    model = LLaVA(
        LLaVAConfig(vision=TOWERS[tower], language=LANGUAGES["lm"], image_token=PLACEHOLDER, vision_layers=(-1,))
    )
    unread = ("norm", "attention_pool")  # what makes one vector of them
    for name, p in model.vision.named_parameters():
        if name.endswith("expand.norm.weight") and tower == "resnet":
            torch.nn.init.ones_(p)  # a fresh bottleneck is its shortcut
    read = {
        name: p
        for name, p in model.vision.named_parameters()
        if not name.startswith(unread) and not name.endswith("k_proj.bias")
    }
    assert_gradient_reaches(sum(model.losses(**batch(model, "lm")).values()), read)
