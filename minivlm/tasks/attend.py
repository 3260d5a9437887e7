"""What does a model look at? The attention that it gives to each part of a picture, drawn over it.

    BLIP-2                   a row a query of the Q-Former (those that differ most), a column a picture
    CLIP, SigLIP             one row: what the token looks at that becomes the picture's vector
    LLaVA, captioner         a row a picture, a column a word that is said about it
    BLIP, fusion encoders,   a row a picture, a column a word of the question, or of the text that BLIP reads; the first is
    VQA, multitask           the start token, at which the answer is read

The weights come from `record_attention`; no model knows of it. They say where information was taken from, not that it
decided anything (Jain and Wallace 2019, "Attention is not Explanation").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minivlm.conversation import DESCRIBE
from minivlm.errors import UserError
from minivlm.image_preprocessing import open_picture, views
from minivlm.layers.position import add_positions
from minivlm.layers.resnet import ResNet
from minivlm.layers.tower import ImageFeatures
from minivlm.models.blip import BLIP
from minivlm.models.blip2 import BLIP2, BLIP2Stage1
from minivlm.models.blip_text import with_first
from minivlm.models.captioner import ImageCaptioningModel
from minivlm.models.clip import CLIP
from minivlm.models.llava import LLaVA
from minivlm.models.multitask import MultitaskVLM
from minivlm.models.uniter import UNITER
from minivlm.models.vilbert import ViLBERT
from minivlm.models.visualbert import VisualBERT
from minivlm.models.vqa import VQAModel
from minivlm.recording import record_attention
from minivlm.tasks.choose import check_chooser, chooses
from minivlm.tasks.features import inference, to_tokens
from minivlm.tasks.generate import can_answer, can_see, caption, check_speaker, model_inputs, question_tokens, say
from minivlm.tasks.match import can_match

if TYPE_CHECKING:
    from PIL import Image

QUERIES = 8  # rows, at most
WORDS = 16  # of an answer, at most
TILE = 144  # pixels of a picture on the sheet


class Looks(NamedTuple):
    """One row of the sheet: somebody looks at these pictures."""

    who: str
    pictures: list[int]  # which of the pictures, for each map
    maps: list[Tensor]  # (h, w): the share of the attention that each patch gets; they add up to 1
    notes: Sequence[str] = ()


def attention_sheet(images: Sequence[Any], model, processor, *, prompt: str | None = None) -> Image.Image:
    """The pictures as the model gets them, and below them what it looks at, a row for each who looks."""
    from minivlm.pictures import Row, heat, sheet

    rows = attention_maps(images, model, processor, prompt=prompt)
    seen = [views(open_picture(image), processor.config)[0] for image in images]
    drawn = [
        Row(row.who, [heat(seen[i], m, TILE) for i, m in zip(row.pictures, row.maps, strict=True)], notes=row.notes)
        for row in rows
    ]
    columns = max(2, min(8, max(len(row.images) for row in drawn)))
    title = f"What {type(model).__name__} looks at: grey not at all, yellow the most"
    return sheet([Row("the pictures", seen), *drawn], title=title, tile=TILE, columns=columns)


def attention_maps(images: Sequence[Any], model, processor, *, prompt: str | None = None) -> list[Looks]:
    """Who looks where, by the table below. prompt: what a model that answers is asked, or what BLIP reads; None: LLaVA is
    asked for a caption, and BLIP reads its own.

    UserError: a model that is not in the table, one in which nobody looks, a picture that cannot be read, no text for a
    model that says none.
    """
    look = next((look for kind, look in LOOKERS.items() if isinstance(model, kind)), None)
    if look is None and can_see(model):
        raise UserError(
            f"what a {type(model).__name__} looks at is not drawn; what BLIP, BLIP-2, CLIP, LLaVA, a captioner, and "
            "models that choose answers look at is."
        )
    if look is None:
        raise UserError(f"a {type(model).__name__} looks at no pictures, so there is no attention to draw.")
    if processor is None:
        raise UserError(f"there is no processor beside this {type(model).__name__}, so it can be shown nothing.")
    return look(list(images), model, processor, prompt)


# ---- who looks -------------------------------------------------------------------------------------------------------


def queries(images: list, model, processor, prompt: str | None) -> list[Looks]:
    """The last cross-attention of a Q-Former, averaged over its heads."""
    pixels = processor.images(images).to(model.device, model.dtype)
    with inference(model):
        features = model.image_features(pixels)
        with record_attention(model.qformer, only=lambda name: name.endswith("cross_attention")) as kept:
            model.qformer(features)
    *_, [last] = kept.values()  # (B, H, Q, S)
    leading = getattr(model.vision, "leading", 0) if model.config.class_token else 0  # tokens in front of the patches
    maps = to_maps(last.mean(dim=1)[..., leading:], pixels)  # (B, Q, h, w)
    everyone = list(range(len(images)))
    return [Looks(f"query {q + 1}", everyone, list(maps[:, q])) for q in different(maps, QUERIES)]


def pooled(images: list, model, processor, prompt: str | None) -> list[Looks]:
    """Who gathers the picture into one vector, averaged over the heads of its last attention."""
    vision = model.vision
    if isinstance(vision, ResNet):
        who, place, leading = "the mean of the picture", "attention_pool.attention", 1
    elif getattr(vision.config, "pool", "mean") == "class":
        who, place, leading = "the class token", f"transformer.blocks.{vision.config.depth - 1}.attention", 1
    elif getattr(vision.config, "pool", "mean") == "attention":
        who, place, leading = "the pooling query", "attention_pool.attention", 0
    else:
        raise UserError(
            "this vision tower takes the mean of its features: nobody in it looks at one more than another."
        )
    pixels = processor.images(images).to(model.device, model.dtype)
    with inference(model), record_attention(vision, only=lambda name: name == place) as kept:
        vision(pixels)
    [weights] = kept[place]  # (B, H, 1, S)
    return [Looks(who, list(range(len(images))), list(to_maps(weights.mean(dim=1)[..., leading:], pixels)[:, 0]))]


def words(images: list, model, processor, prompt: str | None) -> list[Looks]:
    """What each word of an answer, or of a caption, was said in view of: averaged over all heads and layers."""
    check_speaker(model, processor)
    rows = []
    for i, image in enumerate(images):
        asked = [processor.start_token]
        if can_answer(model, processor):
            asked = question_tokens(prompt or DESCRIBE, 1, processor)
        [said] = say([asked], [[image]], model, processor, {})
        maps = maps_of_words(image, asked, said, model, processor)
        notes = [word.strip() for word in processor.spell([[token] for token in said[:WORDS]])]
        rows.append(Looks(processor.decode([said])[0], [i] * len(maps), list(maps), notes))
    return rows


def maps_of_words(image: Any, asked: list[int], said: list[int], model, processor) -> Tensor:
    """(A, h, w): where the A first tokens of the answer were looked up."""
    if not said:
        raise UserError("the model says nothing about the picture, so there is no word to draw: ask something else.")
    pixels, tokens, mask = model_inputs([asked + said], processor.images([image]), model, processor)
    with inference(model), record_attention(model.language_model) as kept:
        model(pixels, tokens, mask)
    A = len(said)  # token j of the answer was foretold by the one before it
    weights = torch.stack([w[0, :, -A - 1 : -1].mean(dim=0) for [w] in kept.values()]).mean(dim=0)[:WORDS]  # (A, S)
    if (mark := getattr(model.config, "image_token", None)) is None:
        return to_maps(weights[:, : model.config.image_tokens], pixels)  # the picture stands in front
    places = (tokens[0] == mark).nonzero()[:, 0][: model.config.features_per_view]  # of the whole, not of its tiles
    return to_maps(weights[:, places[int(model.config.class_token) :]], pixels)


def reading(images: list, model, processor, prompt: str | None) -> list[Looks]:
    """What each word of a text is read in view of: averaged over all heads, and all layers in which words see the picture."""
    blip, kind, prompt = isinstance(model, BLIP), type(model).__name__, (prompt or "").strip() or None
    if not blip:
        check_chooser(model, processor, {})
        if not chooses(model):
            raise UserError(f"this {kind} has no answers to choose from; what it looks at is drawn while it answers.")
    if prompt is None and not (blip and model.config.caption_token):
        raise UserError(f"this {kind} reads what it is asked, and not captions: give it a prompt.")
    where = next(where for of, where in WHERE_WORDS_LOOK.items() if isinstance(model, of))
    leading = getattr(model.vision, "leading", 0) if blip and model.config.class_token else 0
    rows = []
    for i, image in enumerate(images):
        text = prompt or caption(image, model, processor)
        tokens = to_tokens([text], processor, cut=prompt is None)[0].to(model.device)  # (1, T)
        pixels = processor.images([image]).to(model.device, model.dtype)
        with inference(model):
            features = model.image_features(pixels)  # (1, N, C): in a single stream they stand before the words
            with record_attention(model, only=lambda name: fnmatch(name, where)) as kept:
                made_of_it = read(model, tokens, features)
        T, N = tokens.shape[1], features.shape[1]
        shown = [j for j, token in enumerate(tokens[0].tolist()) if token != processor.end_token][:WORDS]
        maps = torch.stack([weights[0, :, -T:, leading:N] for some in kept.values() for weights in some])
        maps = to_maps(maps.mean(dim=(0, 1))[shown], pixels)
        notes = [word.strip() for word in processor.spell([[token] for token in tokens[0, shown[1:]].tolist()])]
        rows.append(Looks(f"{text} {made_of_it}".strip(), [i] * len(shown), list(maps), ["[start]", *notes]))
    return rows


def read(model, tokens: Tensor, features: Tensor) -> str:
    """A text (1, T) is read in front of a picture (1, N, C) → the answer that is chosen, or how well BLIP finds that they
    match; a BLIP that was published for captions or for answers alone only reads."""
    if not isinstance(model, BLIP):
        return model.config.answers[model.answer(ImageFeatures(features), tokens).argmax()]
    if can_match(model):
        _, yes = model.match(ImageFeatures(features), tokens)[0].float().softmax(dim=0).tolist()
        return f"{yes:.0%}"
    if model.config.roles == "caption":
        model.decode(
            with_first(model.config.decode_token, tokens), None, add_positions(features, model.image_position_embedding)
        )
    else:
        model.encode_with_image(features, tokens)
    return ""


WHERE_WORDS_LOOK = {
    BLIP: "*.cross_attention",  # of the encoder, unless it is one that only says captions
    VQAModel: "fusion.*.cross_attention",
    ViLBERT: "connections.*.words.attention",
    VisualBERT: "bert.transformer.*.attention",
    UNITER: "bert.transformer.*.attention",
    MultitaskVLM: "encoder.bert.transformer.*.attention",
}
LOOKERS: dict[type, Callable[[list, Any, Any, str], list[Looks]]] = {
    BLIP2: queries,
    BLIP2Stage1: queries,
    CLIP: pooled,
    ImageCaptioningModel: words,
    LLaVA: words,
    **dict.fromkeys(WHERE_WORDS_LOOK, reading),
}


# ---- maps ------------------------------------------------------------------------------------------------------------


def to_maps(weights: Tensor, pixels: Tensor) -> Tensor:
    """(…, N) weights of the patches, row by row, of pixels (…, H, W) → (…, h, w), each adding up to 1."""
    H, W = pixels.shape[-2:]
    h = round((weights.shape[-1] * H / W) ** 0.5)
    weights = weights.float().cpu()
    return (weights / weights.sum(dim=-1, keepdim=True)).unflatten(-1, (h, -1))


def different(maps: Tensor, most: int) -> list[int]:
    """maps (B, Q, h, w) → at most so many of the queries, in their order, of which each is as far from the rest as can be.

    The first is the farthest from the mean; each next one has the largest distance to the closest of those before.
    """
    points = maps.transpose(0, 1).flatten(1)  # (Q, B · N)
    chosen = [int((points - points.mean(dim=0)).norm(dim=1).argmax())]
    while len(chosen) < min(most, len(points)):
        closest = torch.cdist(points, points[chosen]).amin(dim=1)
        closest[chosen] = -1
        chosen.append(int(closest.argmax()))
    return sorted(chosen)
