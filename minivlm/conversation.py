"""Conversations as tokens, and which of these are learnt (Liu et al. 2023, "Visual Instruction Tuning", §4.2).

    system, user   ── one string ──────→ tokens      not learnt
    assistant      ── alone, then <end> → tokens     learnt: the labels are the tokens themselves

Labels are built while the list of tokens is built, so there is nothing to be searched for in it afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minivlm.chat_templates import (
    CHOICES,
    DESCRIBE,  # noqa: F401  a name of this module as well
    TEMPLATES,
    ChatTemplate,
    Turn,
    check_chat_name,
)
from minivlm.errors import UserError
from minivlm.special_tokens import PLACEHOLDER, Markup, as_text, without_placeholders

if TYPE_CHECKING:
    from minivlm.processor import Processor

ROLES = ("system", "user", "assistant")
IGNORED = -100  # the label of a token that is not learnt


def with_images(text: str, images: int = 1) -> str:
    """The text, plain, with its images in front, each on a line of its own, as LLaVA was trained."""
    return f"{PLACEHOLDER}\n" * images + as_text(text)


def with_chat(processor: Processor, chat: str | None = None, system: str | None = None) -> Processor:
    """The processor with another chat template, or another system text ("" for none).

    UserError: no such template, and a system's text where the template has no place for it.
    """
    check_chat_name(chat)
    if chat is None and system is None:
        return processor
    config = processor.config if chat is None else replace(processor.config, chat=chat, chat_format=None, system=None)
    changed = type(processor)(processor.source, config if system is None else replace(config, system=system))
    if system and (template_of(changed).system is None or template_of(changed).framed):
        raise UserError(f"the chat template {changed.config.chat} has no place for a system's text: leave it out.")
    return changed


def template_of(processor: Processor) -> ChatTemplate:
    """The chat template of the model. UserError where its own is none that can be followed."""
    config = processor.config
    if config.chat == "unknown":
        raise UserError(
            "the model's chat template is not recognised: choose the one that it was trained with by --chat; "
            f"there are {', '.join(CHOICES)}."
        )
    template = config.chat_format if config.chat == "own" else TEMPLATES[config.chat]
    return template if config.system is None else replace(template, default_system=config.system or None)


class Sample(NamedTuple):
    tokens: list[int]
    labels: list[int]  # aligned with tokens; IGNORED: not learnt
    roles: list[str]  # whose turn it is of, one for each token
    cut: int = 0  # tokens of text that the context had no room for


def encode_conversation(
    turns: Sequence[Turn],
    processor: Processor,
    *,
    images: int | None = None,
    context: int | None = None,
    prompt: bool = False,
) -> Sample:
    """The tokens of a conversation, with labels on the assistant's answers and the tokens that end them.

    images   how many images come with it; None: as many as there are placeholders
    context  no more tokens than this: text is cut at the end, image placeholders never
    prompt   the user has the last word, and the tokens end where the assistant's answer begins; nothing is cut
    In a framed template (see `ChatTemplate`) only the last answer is learnt.
    Raises UserError for what `check_conversation` refuses, and where a prompt or the answers do not fit the context.
    """
    check_conversation(turns, images, prompt=prompt)
    template = template_of(processor)
    if template.default_system is not None and turns[0].role != "system":
        turns = [Turn("system", template.default_system), *turns]
    if turns[0].role == "system" and template.system is None:
        raise UserError(
            f"the chat template {processor.config.chat} has no place for a system's text: leave it out, or put it into the "
            "user's first turn."
        )
    sample = Sample([], [], [])
    (write_framed if template.framed else write_turns)(turns, template, processor, sample)
    return sample if context is None else fit(sample, processor, context, prompt=prompt)


def write_turns(turns: Sequence[Turn], template: ChatTemplate, processor: Processor, sample: Sample) -> None:
    """Turn after turn, as a decoder reads them. What is written is one string for the tokeniser, cut before and after each
    answer, so that a prompt has the tokens with which the whole conversation begins."""
    start = []  # of that string
    if template.start is not None:
        start = [Markup(template.start)]
    elif processor.start_token is not None:
        append(sample, [processor.start_token], turns[0].role)
    first, behind = len(sample.tokens), None  # an end token, or what stands for it
    for turn, pieces in template.segments(turns):
        if turn.role == "user":
            ids = processor.ids([*start, *pieces]) if behind is None else ids_behind(behind, pieces, processor)
            append(sample, ids, "user")
            start = []
        else:
            ids = answer_ids(turn.text, template, processor)
            last = turn is turns[-1]
            if template.end_is_read or last:
                ids = [*ids, end_token(template, processor)]
            append(sample, ids, "assistant", learnt=True)
            closed = processor.tokenizer.id_to_token(ids[-1]) if template.end_is_read else None
            behind = ":" if closed is None else closed
    if turns[0].role == "system" and not template.in_user:
        system = [Markup(template.start or ""), *template.system_turn(turns[0].text)]
        n = shared(processor.ids(system), sample.tokens[first:])
        sample.roles[: first + n] = ["system"] * (first + n)


def write_framed(turns: Sequence[Turn], template: ChatTemplate, processor: Processor, sample: Sample) -> None:
    """Images, then all text up to the user's last turn as one, then the answer."""
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    images = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    text = " ".join(without_placeholders(turn.text) for turn in turns[: last + 1])
    placeholders = (
        [processor.image_token_id] * processor.config.image_tokens * images
    )  # none: the model puts them in front
    append(sample, placeholders + processor.ids([text], frame=True), "user")
    for turn in turns[last + 1 :]:
        answer = [*answer_ids(turn.text, template, processor), end_token(template, processor)]
        append(sample, answer, "assistant", learnt=True)


def append(sample: Sample, tokens: list[int], role: str, *, learnt: bool = False) -> None:
    sample.tokens.extend(tokens)
    sample.labels.extend(tokens if learnt else [IGNORED] * len(tokens))
    sample.roles.extend([role] * len(tokens))


def check_conversation(turns: Sequence[Turn], images: int | None = None, *, prompt: bool = False) -> None:
    """UserError, one sentence, unless user and assistant take turns, the user first; no answer is empty; and
    `<image>` stands in the user's texts, as often as there are `images`. (Where it is plain text, see `as_text`.)"""
    roles = [turn.role for turn in turns]
    for number, turn in enumerate(turns, 1):
        if turn.role not in ROLES:
            raise UserError(f"turn {number} has the unknown role {turn.role!r}: a role is one of {', '.join(ROLES)}.")
        if turn.role == "system" and number > 1:
            raise UserError(f"turn {number} is the system's, which can only stand at the beginning.")
        if number > 1 and turn.role == roles[number - 2]:
            raise UserError(f"turns {number - 1} and {number} are both the {turn.role}'s: join them into one.")
        if turn.role != "user" and PLACEHOLDER in turn.text:
            raise UserError(
                f"turn {number} has an {PLACEHOLDER} placeholder, but only the user's turns come with images."
            )
        if turn.role == "assistant" and not turn.text.strip():
            raise UserError(f"turn {number}, the assistant's, is empty: an answer has at least one word.")
    of_turns = [role for role in roles if role != "system"]
    if of_turns[:1] == ["assistant"]:
        raise UserError("the conversation starts with the assistant: the user has the first word.")
    if prompt and of_turns[-1:] != ["user"]:
        raise UserError("there is nothing to be answered: the user has the last word of a prompt.")
    if not prompt and "assistant" not in of_turns:
        raise UserError("there is nothing to learn in this conversation: it has no turn of the assistant.")
    n = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if images is not None and n != images:
        raise UserError(
            f"the number of {PLACEHOLDER} placeholders in the conversation is {n}, but that of its images is {images}."
        )


def answer_ids(text: str, template: ChatTemplate, processor: Processor) -> list[int]:
    """An answer as it is tokenised behind the prompt."""
    return ids_behind(template.seam, template.answer_turn(text), processor)


def ids_behind(seam: str, pieces: Sequence[str], processor: Processor) -> list[int]:
    """Many tokenisers write the first word of a text in another way than the words that follow, so the pieces are given
    something to follow."""
    return processor.ids([Markup(seam), *pieces])[len(processor.ids([Markup(seam)])) :]


def end_token(template: ChatTemplate, processor: Processor) -> int:
    if template.end and (own := processor.tokenizer.token_to_id(template.end)) is not None:
        return own
    if processor.answer_end is None:
        named = f" ({template.end})" if template.end else ""
        raise UserError(
            f"the tokeniser has no token for the end of an answer{named}: choose another chat template by --chat."
        )
    return processor.answer_end


def endings(processor: Processor, end_tokens: Sequence[int]) -> dict[str, Sequence]:
    """Options of `generate`: besides the model's `end_tokens`, what ends an answer in the processor's chat template."""
    template = template_of(processor)
    own = processor.tokenizer.token_to_id(template.end) if template.end else None
    more = () if own is None or own in end_tokens else (own,)
    return {"end_tokens": (*end_tokens, *more), "stop": template.stop}


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens at the beginning that both share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def fit(sample: Sample, processor: Processor, context: int, *, prompt: bool) -> Sample:
    """The sample cut to `context` tokens: the last ones that are no image placeholders go."""
    surplus = len(sample.tokens) - context
    if surplus <= 0:
        return sample
    if prompt:
        raise UserError(
            f"the prompt has {len(sample.tokens)} tokens, but the context has room for {context}: shorten it."
        )
    text = [i for i, token in enumerate(sample.tokens) if token != processor.image_token_id]
    dropped = set(text[-surplus:])
    kept = [i for i in range(len(sample.tokens)) if i not in dropped]
    tokens, labels, roles = ([values[i] for i in kept] for values in sample[:3])
    if len(tokens) > context or all(label == IGNORED for label in labels):
        raise UserError(
            f"the conversation has {len(sample.tokens)} tokens, {len(sample.tokens) - len(text)} of them for images, "
            f"and no answer lies within the context of {context}: shorten what is before it."
        )
    return Sample(tokens, labels, roles, surplus)


def collate(samples: Sequence[Sample], pad_token: int) -> dict[str, Tensor]:
    """B samples → tokens (B, T) int64 padded on the right, labels (B, T) int64 with IGNORED there."""
    T = max(len(sample.tokens) for sample in samples)
    tokens = torch.full((len(samples), T), pad_token)
    labels = torch.full((len(samples), T), IGNORED)
    for i, sample in enumerate(samples):
        tokens[i, : len(sample.tokens)] = torch.tensor(sample.tokens)
        labels[i, : len(sample.labels)] = torch.tensor(sample.labels)
    return {"tokens": tokens, "labels": labels}
