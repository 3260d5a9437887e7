"""Chat templates, which say how the turns of a conversation are written: ChatML, Vicuna, Llama 2 and 3, Zephyr, Mistral,
Gemma, and those of our own models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from minivlm.errors import UserError, nearest
from minivlm.special_tokens import PLACEHOLDER, Markup, split_placeholders

DESCRIBE = "describe the picture."  # the prompt of our own models for a caption


class Turn(NamedTuple):
    role: str  # "system" (at most once, first), "user", "assistant"
    text: str  # a user's text has one <image> for each image


@dataclass(frozen=True)
class ChatTemplate:
    """A {} is where a text stands. `user` goes up to the assistant's answer; {pictures} in it is where the image
    placeholders that a text begins with stand."""

    system: str | None  # None: there is no place for it
    user: str
    answer: str
    end: str | None = None  # the token after an answer; None, or none in the vocabulary: the tokeniser's own end token
    after: str = ""  # what stands between an end token and the next user
    start: str | None = None  # what a conversation begins with; None: the tokeniser's own start token
    default_system: str | None = None  # the system text of a conversation without one; None: none
    in_user: bool = False  # the system's text stands inside the first user's turn, in front of the user's text
    trim: bool = False  # texts lose the white space around them
    end_is_read: bool = True  # False: an earlier answer is read again without its end token
    framed: bool = False  # images first, then all text so far as one, start and end tokens included
    describe: str = DESCRIBE  # how a caption is asked for
    caption: str | None = None  # `user` for this request; None: as for any other
    stop: tuple[str, ...] = ()  # texts that end an answer as well

    def user_turn(self, text: str, system: Sequence[str] = ()) -> list[str]:
        """A user's turn as it is written, in pieces (see `minivlm.special_tokens`). system: what stands inside of it."""
        asked = text.lstrip()
        while asked.startswith(PLACEHOLDER):
            asked = asked.removeprefix(PLACEHOLDER).lstrip()
        form = self.caption if self.caption and asked == self.describe else self.user
        pictures = []
        if "{pictures}" in form:
            pictures = [Markup(PLACEHOLDER)] * (text.count(PLACEHOLDER) - asked.count(PLACEHOLDER))
            text = asked
        before, behind = form.split("{}") if "{}" in form else (form, "")
        first, _, second = before.partition("{pictures}")
        words = split_placeholders(self.trimmed(text)) if "{}" in form else []
        return [Markup(first), *pictures, Markup(second), *system, *words, Markup(behind)]

    def system_turn(self, text: str) -> list[str]:
        """The system's turn in pieces."""
        before, behind = self.system.split("{}")
        return [Markup(before), *split_placeholders(self.trimmed(text)), Markup(behind)]

    def answer_turn(self, text: str) -> list[str]:
        """An answer in pieces, up to its end token."""
        before, behind = self.answer.split("{}")
        return [Markup(before), *split_placeholders(text.strip()), Markup(behind)]

    def trimmed(self, text: str) -> str:
        return text.strip() if self.trim else text

    @property
    def seam(self) -> str:
        """The end of what precedes an answer, or the like of it."""
        return self.user.partition("{}")[2] or ":"

    @property
    def markup(self) -> str:
        """All that it is written with."""
        return " ".join(filter(None, (self.start, self.system, self.user, self.answer, self.end, self.after)))

    def segments(self, turns: Sequence[Turn]) -> Iterator[tuple[Turn, list[str]]]:
        """Yields the pieces of each user's turn, all before it included, and of each answer, without its end token."""
        before: list[str] = []
        inside: list[str] = []
        for turn in turns:
            if turn.role == "system":
                before, inside = (
                    ([], self.system_turn(turn.text)) if self.in_user else (self.system_turn(turn.text), [])
                )
            elif turn.role == "user":
                yield turn, [*before, *self.user_turn(turn.text, inside)]
                before = inside = []
            else:
                yield turn, self.answer_turn(turn.text)
                before = [Markup(self.after)]


# As its documentation has it. It was not trained to end its turn, and continues with the user's.
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
    # OpenAI's format, of Qwen2 and SmolLM2 among others.
    "chatml": ChatTemplate(
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer="{}",
        end="<|im_end|>",
        after="\n",
    ),
    "llama-2": ChatTemplate(
        system="<<SYS>>\n{}\n<</SYS>>\n\n",
        user="<s>[INST] {} [/INST]",
        answer=" {} ",
        end="</s>",
        start="",
        in_user=True,
        trim=True,
    ),
    "llama-3": ChatTemplate(
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{}",
        end="<|eot_id|>",
        start="<|begin_of_text|>",
        trim=True,
    ),
    # Of TinyLlama as well.
    "zephyr": ChatTemplate(
        system="<|system|>\n{}</s>\n",
        user="<|user|>\n{}</s>\n<|assistant|>\n",
        answer="{}",
        end="</s>",
        after="\n",
        start="",
    ),
    # Of the first Mistral; later ones differ in white space, and are followed as well.
    "mistral": ChatTemplate(system=None, user="[INST] {} [/INST]", answer=" {}", end="</s>", start="<s>"),
    "gemma": ChatTemplate(
        system=None,
        user="<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
        answer="{}",
        end="<end_of_turn>",
        after="\n",
        start="<bos>",
        trim=True,
    ),
    # What an encoder reads: a whole text. It hears earlier answers, but only the last one is learnt.
    "encoder": ChatTemplate(system="{} ", user="{}", answer=" {}", framed=True),
    # The published BLIP-2: a caption is what it generates from an image without any text.
    "blip2": ChatTemplate(system="{} ", user="{}", answer=" {}", framed=True, describe=""),
    "idefics": IDEFICS,
    # The instructed one, whose turns have an end.
    "idefics-instruct": replace(
        IDEFICS, user="User:{pictures}{}<end_of_utterance>\nAssistant:", end="<end_of_utterance>", stop=()
    ),
    # OpenFlamingo, as its evaluation has it.
    "openflamingo": ChatTemplate(
        system="{} ",
        user="{pictures}Question:{} Short answer:",
        answer="{}",
        end="<|endofchunk|>",
        caption="{pictures}Output:",
    ),
}
CHOICES = ("plain", "vicuna", "chatml", "llama-2", "llama-3", "zephyr", "mistral", "gemma")  # that one may choose


def check_chat_name(chat: str | None) -> None:
    if chat is not None and chat not in CHOICES:
        raise UserError(f"there is no chat template {chat!r}.{nearest(chat, CHOICES)}")
