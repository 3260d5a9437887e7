"""Text that a model generates about images: a caption, the answer to a question, or the continuation of a text.

    question ── chat template, <image> expanded ──→ tokens ┐
    images   ── processor ────────────────────────→ pixels ┴─ generate ─→ tokens ─ decode ─→ string

The prompt of a captioner is its start token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minivlm.conversation import PLACEHOLDER, Turn, encode_conversation, endings, template_of, with_images
from minivlm.errors import UserError
from minivlm.generation import Options, row_seeds
from minivlm.image_preprocessing import Picture, as_list
from minivlm.layers.tower import Images
from minivlm.special_tokens import Text, as_text
from minivlm.tasks.abilities import can_answer, check_one_image, check_processor, require, require_answers
from minivlm.tasks.choose import choose_all
from minivlm.tasks.features import image_inputs, inference

MAX_NEW_TOKENS = 64  # unless the context has room for fewer


def caption(image: Picture, model, processor, *, prompt: str | None = None, **options) -> str:
    """Describe an image. prompt: what the model is asked, or how a BLIP begins; None: as its kind is asked for a caption.

    options: fields of `generation.Options`, such as temperature=0.7, top_p=0.9.
    UserError: a model that generates no captions, an image that cannot be read, a prompt beyond the context, a prompt for a
    model that takes none, and options that make no sense.
    """
    return caption_all([[image]], model, processor, prompt=prompt, **options)[0]


def answer(images: Picture | Sequence[Picture], question: str, model, processor, **options) -> str:
    """Answer a question about an image, or about several. `<image>` in the question says where each stands; without, they
    stand in front of it. Errors and options: see `caption`."""
    return answer_all([(as_list(images), question)], model, processor, **options)[0]


def caption_all(
    images: Sequence[Sequence[Picture]],
    model,
    processor,
    *,
    prompt: str | None = None,
    batch_size: int = 64,
    **options,
) -> list[str]:
    """`caption` for many samples, each a list of images: one string for each."""
    require(model, processor, "caption")
    start, name = model.caption_token, type(model).__name__
    if start is None and can_answer(model, processor):
        question = template_of(processor).describe if prompt is None else prompt
        return answer_all([(some, question) for some in images], model, processor, batch_size=batch_size, **options)
    check_processor(model, processor)
    if prompt is not None and start is None:
        raise UserError(f"{name} describes images and takes no prompt: leave it out.")
    first, begun = processor.start_token if start is None else start, processor.ids(prompt or "")
    rows = []
    for i in range(0, len(images), batch_size):
        part = [list(some) for some in images[i : i + batch_size]]
        if wrong := [len(some) for some in part if len(some) != 1]:
            raise UserError(f"{name} describes one image at a time, but was given {wrong[0]} at once.")
        new = generate_tokens([[first, *begun]] * len(part), part, model, processor, options)
        rows += [begun + row for row in new]
    return [until_stop(text, options.get("stop", ())) for text in processor.decode(rows)]


def answer_all(
    samples: Sequence[tuple[Sequence[Picture], str]], model, processor, *, batch_size: int = 64, **options
) -> list[str]:
    """`answer` for many samples (images, question), which may differ in the number of images."""
    if "choose" in model.abilities:
        return choose_all(samples, model, processor, batch_size=batch_size, **options)
    require_answers(model, processor, max((len(images) for images, _ in samples), default=0))
    check_one_image([images for images, _ in samples], model)
    how, rows = endings(processor, model.options().end_tokens) | options, []
    for i in range(0, len(samples), batch_size):
        part = [(list(images), question) for images, question in samples[i : i + batch_size]]
        prompts = [question_tokens(question, len(images), processor) for images, question in part]
        rows += generate_tokens(prompts, [images for images, _ in part], model, processor, how)
    return [until_stop(text, how["stop"]) for text in processor.decode(rows)]


def complete(text: str, model, processor, **options) -> str:
    """The text and its continuation, by a language model, or by a model that needs no image."""
    return complete_all([text], model, processor, **options)[0]


def complete_all(texts: Sequence[str], model, processor, **options) -> list[str]:
    """`complete` for a batch of texts."""
    require_answers(model, processor, ability="complete")
    prompts = [prompt_tokens(as_text(text), model, processor) for text in texts]
    if not all(prompts):
        raise UserError("there is no text to continue: give at least one word.")
    rows = generate_tokens(prompts, [[]] * len(prompts), model, processor, options)
    begins, stop = processor.decode(prompts), options.get("stop", ())
    if not model.continues_prompt:
        return [f"{a} {until_stop(b, stop)}" for a, b in zip(begins, processor.decode(rows), strict=True)]
    wholes = processor.decode([prompt + new for prompt, new in zip(prompts, rows, strict=True)])
    return [a + until_stop(whole[len(a) :], stop) for a, whole in zip(begins, wholes, strict=True)]


def prompt_tokens(text: Text, model, processor) -> list[int]:
    """The tokens of a text that is to be continued: behind a start token. An encoder takes it whole, with its end token,
    and its decoder generates a text of its own."""
    if not model.continues_prompt:
        return processor.ids(text, frame=True)
    start = [] if processor.start_token is None else [processor.start_token]
    return start + processor.ids(text)


def question_tokens(question: str, images: int, processor) -> list[int]:
    """The prompt of one question; as many `<image>` as there are images stand in front of a question that has none."""
    if not question.strip() and question != template_of(processor).describe:
        raise UserError("the question is empty; say what you would like to know.")
    if images == 1 and question.count(PLACEHOLDER) == 1 and all(map(str.strip, line_around(PLACEHOLDER, question))):
        raise UserError(
            f"the {PLACEHOLDER} in the middle of a sentence may be a word or the place of the image: leave it out, and the "
            "image stands in front of the question; or put it at the beginning or the end of a line."
        )
    text = question if PLACEHOLDER in question else with_images(question, images)
    return encode_conversation([Turn("user", text)], processor, images=images, prompt=True).tokens


def line_around(placeholder: str, text: str) -> tuple[str, str]:
    """What stands in the same line before and behind a placeholder."""
    before, _, behind = next(line for line in text.split("\n") if placeholder in line).partition(placeholder)
    return before, behind


# ---- from tokens to text ---------------------------------------------------------------------------------------------


def generate_tokens(
    prompts: Sequence[list[int]],
    images: Sequence[Sequence[Picture]],
    model,
    processor,
    options: dict[str, Any],
) -> list[list[int]]:
    """B prompts of any lengths, each with its images → the new tokens of each, without the one that ends them."""
    lengths, counts = [len(prompt) for prompt in prompts], [len(some) for some in images]
    how = fitting(model, max(lengths), max(counts), processor, options)
    if how != fitting(model, min(lengths), min(counts), processor, options):
        return generate_apart(prompts, images, model, processor, options)
    flat = [image for some in images for image in some]
    with inference(model):
        shown = image_inputs(flat, model, processor) if flat else None
        inputs = model_inputs(prompts, shown, model, processor)
        rows = model.generate(*inputs, decode=processor.decode, **vars(how)).tolist()
    return [until_end(row, how.end_tokens) for row in rows]


def generate_apart(prompts: Sequence, images: Sequence, model, processor, options: dict[str, Any]) -> list[list[int]]:
    """`generate_tokens`, where the context leaves a shorter prompt more room: what a row generates does not depend on which
    rows are beside it, so only those with the same room are."""
    rooms = [
        fitting(model, len(prompt), len(some), processor, options).max_new_tokens
        for prompt, some in zip(prompts, images, strict=True)
    ]
    seeds, rows = row_seeds(options.get("seed", 0), len(prompts)), {}
    for room in dict.fromkeys(rooms):
        ours = [i for i, own in enumerate(rooms) if own == room]
        how = {**options, "max_new_tokens": room, "seed": [seeds[i] for i in ours]}
        some = ([prompts[i] for i in ours], [images[i] for i in ours])
        rows.update(zip(ours, generate_tokens(*some, model, processor, how), strict=True))
    return [rows[i] for i in range(len(prompts))]


def model_inputs(prompts: Sequence[list[int]], images: Images | None, model, processor) -> tuple[Images | None, ...]:
    """The arguments of `generate` and `stream`: (images,) tokens (B, T), mask (B, T), on the model's device."""
    T = max(map(len, prompts))
    tokens = torch.tensor([row + [processor.pad_token] * (T - len(row)) for row in prompts])
    mask = torch.arange(T) < torch.tensor([[len(row)] for row in prompts])
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    if not model.takes_images:
        return tokens, mask
    return None if images is None else images.to(model.device, model.dtype), tokens, mask


def fitting(model, length: int, images: int, processor, given: dict[str, Any]) -> Options:
    """Options for a prompt of `length` tokens. If max_new_tokens is not given, it is what the context has room for. No
    placeholder of an image is generated."""
    never = (*processor.placeholder_tokens, *model.options().suppress_tokens)
    given = {"suppress_tokens": never, **given}
    wanted = model.options(**given).max_new_tokens if "max_new_tokens" in given else None
    in_front = model.takes_images and model.image_placeholders is None  # where images stand, not in the prompt
    taken = length + (images * model.config.image_tokens if in_front else 0)
    context = model.language_config.context
    room = context - taken
    if room < (wanted or 1):
        new = f" and {wanted} new ones do" if wanted else " does"
        raise UserError(
            f"the prompt of {taken} tokens{new} not fit the context of {context}: ask in fewer words"
            f"{', give fewer images' if images > 1 else ''}{' or lower max_new_tokens' if wanted else ''}."
        )
    longest = wanted or min(model.options(**given).room(taken), room)
    return model.options(**{**given, "max_new_tokens": longest})


def until_end(row: list[int], end_tokens: Sequence[int]) -> list[int]:
    """Without the token that ends the answer and the padding behind it, which need not be special to the tokeniser."""
    return row[: next((i for i, token in enumerate(row) if token in end_tokens), len(row))]


def until_stop(text: str, stop: Sequence[str]) -> str:
    return text[: min([text.find(s) for s in stop if s in text], default=len(text))].rstrip()
