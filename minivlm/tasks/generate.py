"""A model is shown pictures and says something: a caption, the answer to a question, or how a text goes on.

    question ── chat template, <image> marks expanded ──→ tokens ┐
    pictures ── processor ──────────────────────────────→ pixels ┴─ generate ─→ tokens ─ decode ─→ string

A captioner has no words in front of its caption: it is given the start token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minivlm.conversation import PLACEHOLDER, TEMPLATES, Turn, encode_conversation, endings, template_of, with_images
from minivlm.errors import UserError
from minivlm.generation import Options
from minivlm.special_tokens import Text, as_text
from minivlm.tasks.choose import choose_all, chooses
from minivlm.tasks.features import inference

MAX_NEW_TOKENS = 64  # unless the context has room for fewer

Picture = Any  # a PIL image, a path, or an (H, W, 3) uint8 array


def caption(image: Picture, model, processor, *, prompt: str | None = None, **options) -> str:
    """What is in the picture. prompt: what the model is asked; None: as its kind is asked for a caption.

    options: of `generation.Options`, such as temperature=0.7, top_p=0.9.
    UserError: a model that cannot speak or see, a picture that cannot be read, a prompt beyond the context, and options
    that make no sense. A captioner takes no prompt of your own.
    """
    return caption_all([[image]], model, processor, prompt=prompt, **options)[0]


def answer(images: Picture | Sequence[Picture], question: str, model, processor, **options) -> str:
    """The answer to a question about a picture, or about several. `<image>` marks in the question say where they stand;
    without marks they stand in front of it. Errors and options: see `caption`."""
    images = images if isinstance(images, (list, tuple)) else [images]
    return answer_all([(images, question)], model, processor, **options)[0]


def caption_all(
    pictures: Sequence[Sequence[Picture]],
    model,
    processor,
    *,
    prompt: str | None = None,
    batch_size: int = 64,
    **options,
) -> list[str]:
    """`caption` for many: one string for each sample, which is a list of pictures."""
    start = getattr(getattr(model, "config", None), "caption_token", None)  # BLIP: what begins with it, goes on
    if start is None and can_answer(model, processor):
        asked = template_of(processor).describe if prompt is None else prompt
        return answer_all([(some, asked) for some in pictures], model, processor, batch_size=batch_size, **options)
    check_speaker(model, processor)
    if prompt is not None and start is None:
        raise UserError(f"{type(model).__name__} only describes pictures and reads no prompt: leave it out.")
    first, begun = processor.start_token if start is None else start, processor.ids(prompt or "")
    rows = []
    for i in range(0, len(pictures), batch_size):
        part = [list(some) for some in pictures[i : i + batch_size]]
        if wrong := [len(some) for some in part if len(some) != 1]:
            raise UserError(
                f"{type(model).__name__} describes one picture at a time, but was given {wrong[0]} at once."
            )
        said = say([[first, *begun]] * len(part), part, model, processor, options)
        rows += [begun + row for row in said]
    return [until_stop(text, options.get("stop", ())) for text in processor.decode(rows)]


def answer_all(
    samples: Sequence[tuple[Sequence[Picture], str]], model, processor, *, batch_size: int = 64, **options
) -> list[str]:
    """`answer` for many samples (pictures, question), which may differ in the number of pictures."""
    if chooses(model):
        return choose_all(samples, model, processor, batch_size=batch_size, **options)
    check_answerer(model, processor, max((len(images) for images, _ in samples), default=0))
    check_one_picture([images for images, _ in samples], model)
    how, rows = endings(processor, model.options().end_tokens) | options, []
    for i in range(0, len(samples), batch_size):
        part = [(list(images), question) for images, question in samples[i : i + batch_size]]
        prompts = [question_tokens(question, len(images), processor) for images, question in part]
        rows += say(prompts, [images for images, _ in part], model, processor, how)
    return [until_stop(text, how["stop"]) for text in processor.decode(rows)]


def complete(text: str, model, processor, **options) -> str:
    """The text and how it goes on, for a language model, or for one that can do without a picture."""
    check_answerer(model, processor)
    if getattr(model.config, "one_picture", False):
        raise UserError(
            f"{type(model).__name__} reads a text beside a picture, never alone: use answer, and give it one."
        )
    prompt = beginning(as_text(text), model, processor)
    if not prompt:
        raise UserError("there is no text to go on from; give at least one word.")
    [said] = say([prompt], [[]], model, processor, options)
    if has_encoder(model):
        begin, rest = processor.decode([prompt, said])
        return f"{begin} {until_stop(rest, options.get('stop', ()))}"
    begin, whole = processor.decode([prompt, prompt + said])
    return begin + until_stop(whole[len(begin) :], options.get("stop", ()))


def beginning(text: Text, model, processor) -> list[int]:
    """What a model reads to go on from: the words behind a start token. An encoder reads them as a whole text, with its
    end token, and what is said is a text of its own."""
    if has_encoder(model):
        return processor.ids(text, frame=True)
    start = [] if processor.start_token is None else [processor.start_token]
    return start + processor.ids(text)


def question_tokens(question: str, images: int, processor) -> list[int]:
    """The prompt of one question; `images` marks are put in front of a question that has none."""
    if not question.strip() and question != template_of(processor).describe:
        raise UserError("the question is empty; say what you would like to know.")
    if images == 1 and question.count(PLACEHOLDER) == 1 and all(map(str.strip, line_around(PLACEHOLDER, question))):
        raise UserError(
            f"the {PLACEHOLDER} in the midst of a sentence may be a word or the picture's place: leave it out, and the "
            "picture stands in front of the question; or put it at the beginning or the end of a line."
        )
    text = question if PLACEHOLDER in question else with_images(question, images)
    return encode_conversation([Turn("user", text)], processor, images=images, prompt=True).tokens


def line_around(mark: str, text: str) -> tuple[str, str]:
    """What stands in the same line before and behind a mark."""
    before, _, behind = next(line for line in text.split("\n") if mark in line).partition(mark)
    return before, behind


# ---- from tokens to text ---------------------------------------------------------------------------------------------


def say(
    prompts: Sequence[list[int]],
    pictures: Sequence[Sequence[Picture]],
    model,
    processor,
    options: dict[str, Any],
) -> list[list[int]]:
    """B prompts of any lengths, each with its pictures → the tokens of B answers, without the one that ends them."""
    how = fitting(model, max(map(len, prompts)), max(map(len, pictures)), processor, options)
    images = [image for some in pictures for image in some]
    pixels = processor.images(images) if images else None
    with inference(model):
        inputs = model_inputs(prompts, pixels, model, processor)
        rows = model.generate(*inputs, decode=processor.decode, **vars(how)).tolist()
    return [until_end(row, how.end_tokens) for row in rows]


def model_inputs(prompts: Sequence[list[int]], pixels: Tensor | None, model, processor) -> tuple[Tensor | None, ...]:
    """What `generate` and `stream` begin with: (images,) tokens (B, T), mask (B, T), on the model's device."""
    T = max(map(len, prompts))
    tokens = torch.tensor([row + [processor.pad_token] * (T - len(row)) for row in prompts])
    mask = torch.arange(T) < torch.tensor([[len(row)] for row in prompts])
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    if not can_see(model):
        return tokens, mask
    return None if pixels is None else pixels.to(model.device, model.dtype), tokens, mask


def fitting(model, length: int, images: int, processor, given: dict[str, Any]) -> Options:
    """Options for a prompt of `length` tokens. If max_new_tokens is not given, it is what the context has room for. The
    marks of pictures are not said."""
    never = (*processor.image_marks, *model.options().suppress_tokens)
    given = {"suppress_tokens": never, **given}
    wanted = model.options(**given).max_new_tokens if "max_new_tokens" in given else None
    taken = length + (images * model.config.image_tokens if can_see(model) and places(model) is None else 0)
    context = language_config(model).context
    room = context - taken
    if room < (wanted or 1):
        new = f" and {wanted} new ones do" if wanted else " does"
        raise UserError(
            f"the prompt of {taken} tokens{new} not fit the context of {context}: ask in fewer words"
            f"{', show fewer pictures' if images > 1 else ''}{' or lower max_new_tokens' if wanted else ''}."
        )
    longest = wanted or min(model.options(**given).room(taken), room)
    return model.options(**{**given, "max_new_tokens": longest})


def until_end(row: list[int], end_tokens: Sequence[int]) -> list[int]:
    """Without the token that ends the answer and the padding behind it, which need not be special to the tokeniser."""
    return row[: next((i for i, token in enumerate(row) if token in end_tokens), len(row))]


def until_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))].rstrip()


# ---- who can do what -------------------------------------------------------------------------------------------------


def can_see(model) -> bool:
    return hasattr(model, "vision")


def has_encoder(model) -> bool:
    """Is what it reads apart from what it says, as in T5?"""
    return hasattr(getattr(model, "language_model", model), "encode")


def can_answer(model, processor) -> bool:
    """Does it read words before it speaks? A captioner does not: its pictures have no places in a text."""
    if processor is None or not hasattr(model, "prefill"):
        return False
    if not getattr(model.config, "answers", True):
        return False
    template = TEMPLATES.get(processor.config.chat)  # in a framed one pictures need no places: they come first
    return processor.config.image_tokens > 0 or (template is not None and template.framed) or not can_see(model)


def check_speaker(model, processor) -> None:
    """UserError unless the model speaks, and the tokeniser beside it is the one that it was trained with."""
    name = type(model).__name__
    if not hasattr(model, "prefill") or not getattr(model.config, "speaks", True):
        if chooses(model):
            raise UserError(f"this {name} chooses answers from a list and does not speak: use answer.")
        raise UserError(f"{name} does not speak; captions and answers need a model with a language model, as LLaVA.")
    if processor is None:
        raise UserError(f"there is no processor beside this {name}, so it can neither be shown nor told anything.")
    config = language_config(model)
    for what, theirs, ours in (
        ("image placeholder", processor.image_token_id, getattr(model.config, "image_token", None)),
        ("number of placeholders for a picture", processor.config.image_tokens, places(model)),
    ):
        if ours is not None and theirs != ours:
            raise UserError(
                f"the {what} is {theirs} in the processor but {ours} in the {name}: they do not belong together."
            )
    if processor.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokeniser has {processor.vocab_size} tokens, but the {name} knows {config.vocab_size}: "
            "they do not belong together."
        )


def check_answerer(model, processor, images: int = 0) -> None:
    """UserError unless it reads words, and pictures as well if there are some."""
    check_speaker(model, processor)
    name = type(model).__name__
    if chooses(model):
        raise UserError(
            f"this {name} says captions and chooses answers, but goes on with no text: use caption or answer."
        )
    if not getattr(model.config, "trained_on_questions", True):
        raise UserError(
            f"this {name} describes pictures, but was not trained to answer questions about them: use caption."
        )
    if not can_answer(model, processor):
        raise UserError(f"{name} describes pictures, but reads no words and so answers no questions: use caption.")
    if images and not can_see(model):
        raise UserError(f"{name} reads text alone and cannot be shown a picture.")


def check_one_picture(pictures: Sequence[Sequence[Picture]], model) -> None:
    """UserError for a model whose pictures have no places among the words, unless each sample has one picture."""
    wrong = [len(some) for some in pictures if len(some) != 1]
    if wrong and getattr(model.config, "one_picture", False):
        raise UserError(f"{type(model).__name__} looks at one picture at a time, but was given {wrong[0]} at once.")


def language_config(model):
    """Of what reads and says words: its vocabulary and its context."""
    return getattr(model, "language_config", None) or getattr(model, "language_model", model).config


def places(model) -> int | None:
    """Placeholders in the text that a picture takes; None: it has no places there."""
    return None if getattr(model.config, "image_token", None) is None else model.config.image_tokens
