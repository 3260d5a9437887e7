"""Conversations as tokens, and which of these are learnt (Liu et al. 2023, "Visual Instruction Tuning", §4.2).

    system, user   ── one string ──────→ tokens      not learnt
    assistant      ── alone, then <end> → tokens     learnt: the labels are the tokens themselves

Labels are built while the list of tokens is built, so there is nothing to be searched for in it afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minivlm.errors import UserError

if TYPE_CHECKING:
    from minivlm.processor import Processor

ROLES = ("system", "user", "assistant")
MARK = "<image>"  # where a picture stands in a user's text
DESCRIBE = "describe the picture."  # what our own models are asked when a caption is wanted
IGNORED = -100  # the label of a token that is not learnt


class Turn(NamedTuple):
    role: str  # "system" (at most once, first), "user", "assistant"
    text: str  # a user's text has one <image> for each picture


def with_images(text: str, images: int = 1) -> str:
    """The text with its pictures in front, each on a line of its own, as LLaVA was trained."""
    return f"{MARK}\n" * images + text


@dataclass(frozen=True)
class ChatTemplate:
    """How the turns are written. `user` goes up to the assistant's first word; where it says {pictures}, the marks that a
    text begins with stand there."""

    system: str
    user: str
    answer: str
    seam: str = ":"  # what stands before an answer, or the like of it
    end: str | None = None  # the token after an answer; None, or none in the vocabulary: the tokeniser's own end token
    after: str = ""  # what stands between an end token and the next user
    framed: bool = False  # pictures first, then all that was said so far as one text, start and end tokens included
    describe: str = DESCRIBE  # how a caption is asked for
    caption: str | None = None  # `user` for this request; None: as for any other
    stop: tuple[str, ...] = ()  # texts that end an answer as well

    def ask(self, text: str) -> str:
        """A user's turn, as it is written."""
        asked = text.lstrip()
        while asked.startswith(MARK):
            asked = asked.removeprefix(MARK).lstrip()
        form = self.caption if self.caption and asked == self.describe else self.user
        if "{pictures}" not in form:
            return form.format(text)
        return form.format(asked, pictures=MARK * (text.count(MARK) - asked.count(MARK)))


# In the words of its documentation. It was not taught to end its turn, and goes on with the user's.
IDEFICS = ChatTemplate(
    system="{}\n",
    user="User:{pictures}{}\nAssistant:",
    answer=" {}",
    end="</s>",
    after="\n",
    describe="Describe this image.",
    stop=("\nUser:",),
)
TEMPLATES = {
    "plain": ChatTemplate(system="{} ", user="{}", answer=" {}"),
    # FastChat's "vicuna_v1.1", with which LLaVA-1.5 was trained.
    "vicuna": ChatTemplate(system="{} ", user="USER: {} ASSISTANT:", answer=" {}", end="</s>"),
    # OpenAI's format, of Qwen2 among others.
    "chatml": ChatTemplate(
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer="{}",
        seam="\n",
        end="<|im_end|>",
        after="\n",
    ),
    # What an encoder reads: a whole text. It hears earlier answers, but only the last one is learnt.
    "encoder": ChatTemplate(system="{} ", user="{}", answer=" {}", framed=True),
    # The published BLIP-2: a caption is what it says to a picture without any words.
    "blip2": ChatTemplate(system="{} ", user="{}", answer=" {}", framed=True, describe=""),
    "idefics": IDEFICS,
    # The instructed one, whose turns have an end.
    "idefics-instruct": replace(
        IDEFICS, user="User:{pictures}{}<end_of_utterance>\nAssistant:", end="<end_of_utterance>", stop=()
    ),
    # OpenFlamingo, in the words of its evaluation.
    "openflamingo": ChatTemplate(
        system="{} ",
        user="{pictures}Question:{} Short answer:",
        answer="{}",
        end="<|endofchunk|>",
        caption="{pictures}Output:",
    ),
}


class Sample(NamedTuple):
    tokens: list[int]
    labels: list[int]  # aligned with tokens; IGNORED: not learnt
    roles: list[str]  # who says it, one for each token
    cut: int = 0  # tokens of text that the context had no room for


def encode_conversation(
    turns: Sequence[Turn],
    processor: Processor,
    *,
    images: int | None = None,
    context: int | None = None,
    prompt: bool = False,
) -> Sample:
    """The tokens of a conversation, with labels on all that the assistant says and on the end of it.

    images   how many pictures come with it; None: as many as there are marks
    context  no more tokens than this: text is cut at the end, image placeholders never
    prompt   the user has the last word, and the tokens end where the assistant begins to speak; nothing is cut
    In a framed template (see `ChatTemplate`) only the last answer is learnt.
    Raises UserError for what `check_conversation` refuses, and where a prompt or the answers do not fit the context.
    """
    check_conversation(turns, images, prompt=prompt)
    template = TEMPLATES[processor.config.chat]
    sample = Sample([], [], [])
    (write_framed if template.framed else write_turns)(turns, template, processor, sample)
    return sample if context is None else fit(sample, processor, context, prompt=prompt)


def write_turns(turns: Sequence[Turn], template: ChatTemplate, processor: Processor, sample: Sample) -> None:
    """Turn after turn, as a decoder reads them."""
    if processor.start_token is not None:
        append(sample, [processor.start_token], turns[0].role)
    first = len(sample.tokens)
    before = ""  # a system's text is one string with the user's, so that the seam is tokenised as it is in any text
    for turn in turns:
        if turn.role == "system":
            before = template.system.format(turn.text)
        elif turn.role == "user":
            append(sample, processor.ids(before + template.ask(turn.text)), "user")
        else:
            answer = [*answer_ids(turn.text, template, processor), end_token(template, processor)]
            append(sample, answer, "assistant", learnt=True)
            before = template.after
    if turns[0].role == "system":
        n = shared(processor.ids(template.system.format(turns[0].text)), sample.tokens[first:])
        sample.roles[: first + n] = ["system"] * (first + n)


def write_framed(turns: Sequence[Turn], template: ChatTemplate, processor: Processor, sample: Sample) -> None:
    """Pictures, then all up to the user's last word as one text, then the answer to that."""
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    pictures = sum(turn.text.count(MARK) for turn in turns)
    text = " ".join(turn.text.replace(MARK, "").strip() for turn in turns[: last + 1])
    places = [processor.image_token_id] * processor.config.image_tokens * pictures  # none: the model puts them in front
    append(sample, places + processor.ids(text, frame=True), "user")
    for turn in turns[last + 1 :]:
        answer = [*answer_ids(turn.text, template, processor), end_token(template, processor)]
        append(sample, answer, "assistant", learnt=True)


def append(sample: Sample, tokens: list[int], role: str, *, learnt: bool = False) -> None:
    sample.tokens.extend(tokens)
    sample.labels.extend(tokens if learnt else [IGNORED] * len(tokens))
    sample.roles.extend([role] * len(tokens))


def check_conversation(turns: Sequence[Turn], images: int | None = None, *, prompt: bool = False) -> None:
    """UserError, one sentence, unless user and assistant take turns, the user first; every answer says something; and
    the marks `<image>` are in the user's texts and as many as the `images`."""
    roles = [turn.role for turn in turns]
    for number, turn in enumerate(turns, 1):
        if turn.role not in ROLES:
            raise UserError(f"turn {number} has the unknown role {turn.role!r}: a role is one of {', '.join(ROLES)}.")
        if turn.role == "system" and number > 1:
            raise UserError(f"turn {number} is the system's, which can only stand at the beginning.")
        if number > 1 and turn.role == roles[number - 2]:
            raise UserError(f"turns {number - 1} and {number} are both the {turn.role}'s: join them into one.")
        if turn.role == "assistant" and not turn.text.strip():
            raise UserError(f"turn {number}, the assistant's, is empty: an answer has at least one word.")
        if turn.role != "user" and MARK in turn.text:
            raise UserError(f"turn {number} has an {MARK} mark, but only what the user says comes with pictures.")
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] == ["assistant"]:
        raise UserError("the conversation starts with the assistant: the user has the first word.")
    if prompt and spoken[-1:] != ["user"]:
        raise UserError("there is nothing to be answered: the user has the last word of a prompt.")
    if not prompt and "assistant" not in spoken:
        raise UserError("there is nothing to learn in this conversation: the assistant says nothing.")
    marks = sum(turn.text.count(MARK) for turn in turns)
    if images is not None and marks != images:
        raise UserError(
            f"the number of {MARK} marks in the conversation is {marks}, but that of its images is {images}."
        )


def answer_ids(text: str, template: ChatTemplate, processor: Processor) -> list[int]:
    """An answer as it is tokenised behind the prompt. Many tokenisers write the first word of a text in another way
    than the words that follow, so it is given something to follow."""
    behind = processor.ids(template.seam + template.answer.format(text.strip()))
    return behind[len(processor.ids(template.seam)) :]


def end_token(template: ChatTemplate, processor: Processor) -> int:
    if template.end and (own := processor.tokenizer.token_to_id(template.end)) is not None:
        return own
    if processor.end_token is None:
        named = f" ({template.end})" if template.end else ""
        raise UserError(f"the tokeniser has no token for the end of an answer{named}: choose another chat template.")
    return processor.end_token


def endings(processor: Processor, end_tokens: Sequence[int]) -> dict[str, Sequence]:
    """Options of `generate`: besides the model's `end_tokens`, what ends an answer in the processor's chat template."""
    template = TEMPLATES[processor.config.chat]
    own = processor.tokenizer.token_to_id(template.end) if template.end else None
    more = () if own is None or own in end_tokens else (own,)
    return {"end_tokens": (*end_tokens, *more), "stop": template.stop}


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def fit(sample: Sample, processor: Processor, context: int, *, prompt: bool) -> Sample:
    """At most `context` tokens: without the last ones that are no image placeholders."""
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
            f"the conversation has {len(sample.tokens)} tokens, {len(sample.tokens) - len(text)} of them for pictures, "
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


def show_sample(sample: Sample, processor: Processor) -> str:
    """Role, token and label of each position side by side, runs of image placeholders as one line."""
    name = processor.tokenizer.id_to_token
    rows = []
    for role, token, label in zip(sample.roles, sample.tokens, sample.labels, strict=True):
        if token == processor.image_token_id and rows and rows[-1][1] == token:
            rows[-1][3] += 1
        else:
            rows.append([role, token, label, 1])
    lines = [f"{'role':11}{'token':22}label"]
    for role, token, label, times in rows:
        shown = name(token) + (f" × {times}" if times > 1 else "")
        lines.append(f"{role:11}{shown:22}{'·' if label == IGNORED else name(label)}")
    if sample.cut:
        lines.append(f"{sample.cut} more tokens of text do not fit the context")
    return "\n".join(lines)
