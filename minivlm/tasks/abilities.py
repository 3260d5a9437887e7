"""Can this model be asked for that? What every task checks first, by what the model says of itself (`Model.abilities`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minivlm.chat_templates import TEMPLATES
from minivlm.errors import UserError

ABILITIES = {  # of `Model.abilities`, in the order in which a sentence names them
    "encode": "compare texts and images as vectors",
    "compare": "compare images with images as vectors",
    "match": "match texts with images",
    "caption": "describe images",
    "answer": "answer questions",
    "choose": "choose an answer from its list",
    "rank": "rank answers",
    "chat": "chat",
    "complete": "continue a text",
    "attend": "show its attention to an image",
    "few-shot": "learn from examples in its prompt",
}


def require(model, processor, *abilities: str) -> None:
    """UserError unless the model has one of these abilities, and a processor that prepares what it takes."""
    name = type(model).__name__
    if not model.abilities & set(abilities):
        can = [what for ability, what in ABILITIES.items() if ability in model.abilities]
        instead = f"it can {', '.join(can[:-1])}{' and ' if can[1:] else ''}{can[-1]}" if can else "no task can use it"
        raise UserError(f"this {name} cannot {' or '.join(ABILITIES[word] for word in abilities)}; {instead}.")
    if processor is None:
        raise UserError(f"there is no processor beside this {name}, so it can be given neither images nor texts.")


def require_vectors(model, processor, *, texts: bool = False) -> None:
    """UserError unless the model gives vectors of images, and of texts where those are wanted."""
    tower = "compare" in model.abilities
    if tower and texts:
        raise UserError(f"this {type(model).__name__} takes images alone, and no text: give the path of an image.")
    require(model, processor, "compare" if tower else "encode")


def require_answers(model, processor, images: int = 0, ability: str = "answer") -> None:
    """UserError unless the model answers a text with so many images, in words of its own."""
    require(model, processor, ability)
    check_processor(model, processor)
    name = type(model).__name__
    if not can_answer(model, processor):
        raise UserError(f"this {name} has no place for a question in its prompt: use caption.")
    if images and not model.takes_images:
        raise UserError(f"this {name} takes text alone, and no image.")


def can_answer(model, processor) -> bool:
    """Does it answer a question? Where an image has no placeholder, the chat template has to give it a place."""
    template = TEMPLATES.get(processor.config.chat)
    framed = template is not None and template.framed
    return "answer" in model.abilities and (processor.config.image_tokens > 0 or framed or not model.takes_images)


def check_processor(model, processor) -> None:
    """UserError unless the processor has the image placeholders of the model, and no more tokens than it."""
    name, image_token = type(model).__name__, None
    if model.image_placeholders is not None:
        image_token = model.config.image_token
    for what, theirs, ours in (
        ("image placeholder", processor.image_token_id, image_token),
        ("number of placeholders for an image", processor.config.image_tokens, model.image_placeholders),
    ):
        if ours is not None and theirs != ours:
            raise UserError(
                f"the {what} is {theirs} in the processor but {ours} in the {name}: they do not belong together."
            )
    if processor.vocab_size > (known := model.language_config.vocab_size):
        raise UserError(
            f"the tokeniser has {processor.vocab_size} tokens, but the {name} has {known}: they do not belong together."
        )


def check_one_image(images: Sequence[Sequence[Any]], model) -> None:
    """UserError for a model that takes one image with each text, unless each sample has one."""
    if model.one_image and (wrong := [len(some) for some in images if len(some) != 1]):
        raise UserError(f"{type(model).__name__} takes one image at a time, but was given {wrong[0]} at once.")
