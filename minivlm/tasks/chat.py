"""A conversation about images: every prompt holds all earlier turns, and an answer comes word by word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minivlm.conversation import PLACEHOLDER, Turn, as_text, encode_conversation, endings, with_images
from minivlm.errors import UserError
from minivlm.generation import Options
from minivlm.image_preprocessing import Picture
from minivlm.tasks.abilities import check_one_image, require_answers
from minivlm.tasks.generate import MAX_NEW_TOKENS, fitting, model_inputs
from minivlm.text_stream import TextStream


def chat(model, processor, *images: Picture, **options) -> Chat:
    """Start a conversation, with these images. options: fields of `generation.Options`."""
    conversation = Chat(model, processor, **options)
    for image in images:
        conversation.see(image)
    return conversation


@dataclass(frozen=True)
class Exchange:
    """A question with the images that came with it, and the answer as far as it came."""

    pixels: tuple[Tensor, ...]  # (1, [views,] 3, S, S) each
    question: str
    answer: str = ""

    @property
    def user(self) -> Turn:
        return Turn("user", with_images(self.question, len(self.pixels)))


class Chat:
    """chat.see(image); for piece in chat.say("what is it?"): print(piece, end="")

    The model is put into eval mode. options: fields of `generation.Options`; with beams an answer comes as a whole.
    When a conversation outgrows the context, its oldest exchanges are dropped; `dropped` counts those of the last `say`.
    Their images are dropped too, unless there is no newer one.
    """

    def __init__(self, model, processor, **options):
        require_answers(model, processor, ability="chat")
        model.options(**options)  # an error comes now rather than at the first question
        self.model, self.processor = model.eval(), processor
        self.options = endings(processor, model.options().end_tokens) | options
        self.exchanges: list[Exchange] = []
        self.waiting: tuple[Tensor, ...] = ()  # images that the next question is about
        self.dropped = 0

    @property
    def turns(self) -> list[Turn]:
        """The turns that were not dropped."""
        return [turn for e in self.exchanges for turn in (e.user, Turn("assistant", e.answer))]

    def see(self, image: Picture) -> None:
        """Add an image; the next question is about it. UserError: it cannot be read, or the model takes none."""
        require_answers(self.model, self.processor, images=1, ability="chat")
        self.waiting = (*self.waiting, self.processor.images([image]))

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces, as they come; `close` and Ctrl-C leave it as far as it came.

        An answer of which nothing came is dropped, and its images wait for the next question.
        UserError, and nothing has changed: an empty question, one with `<image>` in it, one that does not fit the context.
        """
        if not text.strip():
            raise UserError("the question is empty; say something.")
        if PLACEHOLDER in text and self.model.takes_images:
            raise UserError(
                f"images stand in front of the question, without {PLACEHOLDER} in it: add the image, then ask."
            )
        exchanges, question, tokens = self.fit(Exchange(self.waiting, text))
        pixels = [p for e in (*exchanges, question) for p in e.pixels]
        check_one_image([pixels], self.model)
        options = fitting(self.model, len(tokens), len(pixels), self.processor, self.options)
        self.dropped, self.exchanges = len(self.exchanges) - len(exchanges), exchanges
        self.waiting = question.pixels
        return self.generate(question, tokens, torch.cat(pixels) if pixels else None, options)

    def fit(self, question: Exchange) -> tuple[list[Exchange], Exchange, list[int]]:
        """As many of the exchanges as the context has room for, the question, and the tokens of both."""
        exchanges, context = self.exchanges, self.model.language_config.context
        new = self.options.get("max_new_tokens", min(MAX_NEW_TOKENS, context // 4))  # kept free for the answer
        while True:
            turns = [turn for e in exchanges for turn in (e.user, Turn("assistant", e.answer))]
            tokens = encode_conversation([*turns, question.user], self.processor, prompt=True).tokens
            if not exchanges or len(tokens) + new <= context:
                return exchanges, question, tokens
            oldest, *exchanges = exchanges
            if not any(e.pixels for e in (*exchanges, question)):
                if exchanges:
                    exchanges[0] = replace(exchanges[0], pixels=oldest.pixels)
                else:
                    question = replace(question, pixels=oldest.pixels)

    def generate(self, question: Exchange, tokens: list[int], pixels: Tensor | None, options: Options) -> Iterator[str]:
        answer = ""
        text = TextStream(self.processor.decode, options.stop, words=self.processor.tidies)
        try:
            for token in self.tokens(tokens, pixels, options):
                piece = text.feed(token)
                if piece:
                    answer += piece
                    yield piece
            if piece := text.end():
                answer += piece
                yield piece
        finally:
            if answer.strip():
                self.exchanges = [*self.exchanges, replace(question, answer=as_text(answer.strip()))]
                self.waiting = ()

    def tokens(self, prompt: list[int], pixels: Tensor | None, options: Options) -> Iterator[int]:
        """Yield the tokens of the answer, without the one that ends it; with beam search, all of them at the end."""
        how = {**vars(options), "decode": self.processor.decode}
        inputs = model_inputs([prompt], pixels, self.model, self.processor)
        columns = self.model.generate(*inputs, **how).T if options.num_beams > 1 else self.model.stream(*inputs, **how)
        for column in columns:
            if (token := int(column[0])) in options.end_tokens:
                return
            yield token
