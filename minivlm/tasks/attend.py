"""The attention that a model gives to each part of an image, drawn over the image.

    BLIP-2                   a row for each query of the Q-Former (those that differ most), a column for each image
    CLIP, SigLIP             one row: the attention of the token that becomes the vector of the image
    LLaVA, captioner         a row for each image, a column for each word that is generated
    BLIP, fusion encoders,   a row for each image, a column for each word of the question, or of the text that BLIP is given;
    VQA, multitask           the first is the start token, whose state the answer is computed from

`record_attention` takes the weights; no model knows of it. They say where information comes from, not that it decides
anything (Jain and Wallace 2019, "Attention is not Explanation").
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minivlm.conversation import DESCRIBE
from minivlm.errors import UserError
from minivlm.image_preprocessing import Picture, open_image
from minivlm.image_preprocessing import views as views_of
from minivlm.layers.position import add_positions
from minivlm.layers.resnet import ResNet
from minivlm.layers.tower import ImageFeatures
from minivlm.models.blip_text import with_first
from minivlm.recording import record_attention
from minivlm.tasks.abilities import can_answer, check_processor, require
from minivlm.tasks.choose import check_chooser
from minivlm.tasks.features import inference, to_tokens
from minivlm.tasks.generate import caption, generate_tokens, model_inputs, question_tokens

if TYPE_CHECKING:
    from PIL import Image

QUERIES = 8  # rows, at most
WORDS = 16  # of an answer, at most
TILE = 144  # pixels of an image on the sheet


class Maps(NamedTuple):
    """One row of the sheet."""

    title: str
    images: list[int]  # which of the images, for each map
    maps: list[Tensor]  # (h, w): the share of the attention that each patch gets; they add up to 1
    notes: Sequence[str] = ()


def attention_sheet(images: Sequence[Picture], model, processor, *, prompt: str | None = None) -> Image.Image:
    """Draw the images as the model gets them, and below them the `attention_maps`."""
    from minivlm.pictures import Row, heat, sheet

    rows = attention_maps(images, model, processor, prompt=prompt)
    views = [views_of(open_image(image), processor.config)[0] for image in images]
    drawn = [
        Row(row.title, [heat(views[i], m, TILE) for i, m in zip(row.images, row.maps, strict=True)], notes=row.notes)
        for row in rows
    ]
    columns = max(2, min(8, max(len(row.images) for row in drawn)))
    title = f"The attention of {type(model).__name__} to the images: grey none, yellow the most"
    return sheet([Row("the images", views), *drawn], title=title, tile=TILE, columns=columns)


def attention_maps(images: Sequence[Picture], model, processor, *, prompt: str | None = None) -> list[Maps]:
    """The attention to each image, as the table above has it. prompt: what a model that answers is asked, or a text for
    BLIP; None: LLaVA is asked for a caption, and BLIP is given its own caption.

    UserError: a model that is not in the table, or pools without attention, an image that cannot be read, no text for a
    model that generates none.
    """
    require(model, processor, "attend")
    kinds = {"queries": of_queries, "pooling": of_pooling, "answer": of_answer}
    return kinds.get(model.image_attention, of_text)(list(images), model, processor, prompt)


# ---- whose attention -------------------------------------------------------------------------------------------------


def of_queries(images: list, model, processor, prompt: str | None) -> list[Maps]:
    """The last cross-attention of a Q-Former, averaged over its heads."""
    pixels = processor.images(images).to(model.device, model.dtype)
    with inference(model):
        features = model.image_features(pixels)
        with record_attention(model.qformer, only=lambda name: name.endswith("cross_attention")) as kept:
            model.qformer(features)
    *_, [last] = kept.values()  # (B, H, Q, S)
    maps = to_maps(last.mean(dim=1)[..., class_tokens(model) :], pixels)  # (B, Q, h, w)
    all_images = list(range(len(images)))
    return [Maps(f"query {q + 1}", all_images, list(maps[:, q])) for q in different(maps, QUERIES)]


def class_tokens(model) -> int:
    """How many features stand in front of those of the patches."""
    return getattr(model.vision, "leading", 0) if model.config.class_token else 0


def of_pooling(images: list, model, processor, prompt: str | None) -> list[Maps]:
    """The attention that pools the image into one vector, the last, averaged over its heads."""
    vision = model.vision
    if isinstance(vision, ResNet):
        title, place, leading = "the mean of the image", "attention_pool.attention", 1
    elif getattr(vision.config, "pool", "mean") == "class":
        title, place, leading = "the class token", f"transformer.blocks.{vision.config.depth - 1}.attention", 1
    elif getattr(vision.config, "pool", "mean") == "attention":
        title, place, leading = "the pooling query", "attention_pool.attention", 0
    else:
        raise UserError("this vision tower takes the mean of its features: no attention pools them.")
    pixels = processor.images(images).to(model.device, model.dtype)
    with inference(model), record_attention(vision, only=lambda name: name == place) as kept:
        vision(pixels)
    [weights] = kept[place]  # (B, H, 1, S)
    return [Maps(title, list(range(len(images))), list(to_maps(weights.mean(dim=1)[..., leading:], pixels)[:, 0]))]


def of_answer(images: list, model, processor, prompt: str | None) -> list[Maps]:
    """The attention from which each word of an answer, or of a caption, is computed: averaged over all heads and layers."""
    check_processor(model, processor)
    rows = []
    for i, image in enumerate(images):
        tokens = [processor.start_token]
        if can_answer(model, processor):
            tokens = question_tokens(prompt or DESCRIBE, 1, processor)
        [answer] = generate_tokens([tokens], [[image]], model, processor, {})
        maps = maps_of_answer(image, tokens, answer, model, processor)
        notes = [word.strip() for word in processor.spell([[token] for token in answer[:WORDS]])]
        rows.append(Maps(processor.decode([answer])[0], [i] * len(maps), list(maps), notes))
    return rows


def maps_of_answer(image: Picture, prompt: list[int], answer: list[int], model, processor) -> Tensor:
    """(A, h, w): the attention from which the first A tokens of the answer are computed."""
    if not answer:
        raise UserError("the model generates nothing about the image, so there is no word to draw: ask something else.")
    pixels, tokens, mask = model_inputs([prompt + answer], processor.images([image]), model, processor)
    with inference(model), record_attention(model.language_model) as kept:
        model(pixels, tokens, mask)
    A = len(answer)  # token j of the answer is predicted at the one before it
    weights = torch.stack([w[0, :, -A - 1 : -1].mean(dim=0) for [w] in kept.values()]).mean(dim=0)[:WORDS]  # (A, S)
    if model.image_placeholders is None:
        return to_maps(weights[:, : model.config.image_tokens], pixels)  # the image stands in front
    where = (tokens[0] == model.config.image_token).nonzero()[:, 0]
    where = where[: model.config.features_per_view]  # of the whole, not of its tiles
    return to_maps(weights[:, where[int(model.config.class_token) :]], pixels)


def of_text(images: list, model, processor, prompt: str | None) -> list[Maps]:
    """The attention of each word of a text: averaged over all heads, and all layers in which words attend to the image."""
    chooses, kind, prompt = "choose" in model.abilities, type(model).__name__, (prompt or "").strip() or None
    if chooses:
        check_chooser(model, processor, {})
    if prompt is None and model.caption_token is None:
        raise UserError(f"this {kind} answers a question, and generates no captions: give it a prompt.")
    leading = 0 if chooses else class_tokens(model)
    rows = []
    for i, image in enumerate(images):
        text = prompt or caption(image, model, processor)
        tokens = to_tokens([text], processor, cut=prompt is None)[0].to(model.device)  # (1, T)
        pixels = processor.images([image]).to(model.device, model.dtype)
        with inference(model):
            features = model.image_features(pixels)  # (1, N, C): in a single stream they stand before the words
            with record_attention(model, only=lambda name: fnmatch(name, model.image_attention)) as kept:
                result = run_text(model, tokens, features)
        T, N = tokens.shape[1], features.shape[1]
        shown = [j for j, token in enumerate(tokens[0].tolist()) if token != processor.end_token][:WORDS]
        maps = torch.stack([weights[0, :, -T:, leading:N] for some in kept.values() for weights in some])
        maps = to_maps(maps.mean(dim=(0, 1))[shown], pixels)
        notes = [word.strip() for word in processor.spell([[token] for token in tokens[0, shown[1:]].tolist()])]
        rows.append(Maps(f"{text} {result}".strip(), [i] * len(shown), list(maps), ["[start]", *notes]))
    return rows


def run_text(model, tokens: Tensor, features: Tensor) -> str:
    """A text (1, T) and an image (1, N, C) → the answer that is chosen, or the probability that they match; of a BLIP that
    was published for captions or for answers alone, nothing."""
    if "choose" in model.abilities:
        return model.config.answers[model.answer(ImageFeatures(features), tokens).argmax()]
    if "match" in model.abilities:
        _, yes = model.match(ImageFeatures(features), tokens)[0].float().softmax(dim=0).tolist()
        return f"{yes:.0%}"
    if model.config.roles == "caption":
        model.decode(
            with_first(model.config.decode_token, tokens), None, add_positions(features, model.image_position_embedding)
        )
    else:
        model.encode_with_image(features, tokens)
    return ""


# ---- maps ------------------------------------------------------------------------------------------------------------


def to_maps(weights: Tensor, pixels: Tensor) -> Tensor:
    """(…, N) weights of the patches, row by row, of pixels (…, H, W) → (…, h, w), each adding up to 1."""
    H, W = pixels.shape[-2:]
    h = round((weights.shape[-1] * H / W) ** 0.5)
    weights = weights.float().cpu()
    return (weights / weights.sum(dim=-1, keepdim=True)).unflatten(-1, (h, -1))


def different(maps: Tensor, most: int) -> list[int]:
    """maps (B, Q, h, w) → at most so many of the queries, in their order, those that differ most.

    The first is the farthest from the mean; each next one has the largest distance to the closest of those before.
    """
    points = maps.transpose(0, 1).flatten(1)  # (Q, B · N)
    chosen = [int((points - points.mean(dim=0)).norm(dim=1).argmax())]
    while len(chosen) < min(most, len(points)):
        closest = torch.cdist(points, points[chosen]).amin(dim=1)
        closest[chosen] = -1
        chosen.append(int(closest.argmax()))
    return sorted(chosen)
