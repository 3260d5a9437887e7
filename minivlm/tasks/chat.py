"""A conversation about pictures: what was said before is read again with every question, and answers come word by word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minivlm.conversation import PLACEHOLDER, Turn, as_text, encode_conversation, endings, with_images
from minivlm.errors import UserError
from minivlm.generation import Options
from minivlm.tasks.generate import (
    MAX_NEW_TOKENS,
    Picture,
    can_see,
    check_answerer,
    check_one_picture,
    fitting,
    language_config,
    model_inputs,
)
from minivlm.text_stream import TextStream


def chat(model, processor, *pictures: Picture, **options) -> Chat:
    """A conversation that begins with these pictures. options: of `generation.Options`."""
    conversation = Chat(model, processor, **options)
    for picture in pictures:
        conversation.see(picture)
    return conversation


@dataclass(frozen=True)
class Exchange:
    """A question with the pictures that came with it, and the answer as far as it came."""

    pixels: tuple[Tensor, ...]  # (1, [views,] 3, S, S) each
    question: str
    answer: str = ""

    @property
    def user(self) -> Turn:
        return Turn("user", with_images(self.question, len(self.pixels)))


class Chat:
    """chat.see(picture); for piece in chat.say("what is it?"): print(piece, end="")

    The model is put into eval mode. options: of `generation.Options`; with beams an answer comes as a whole.
    When a conversation outgrows the context, its oldest exchanges are forgotten; `dropped` is how many that were in the
    last `say`. Their pictures go too, unless no newer one was shown: those stay in view.
    """

    def __init__(self, model, processor, **options):
        check_answerer(model, processor)
        model.options(**options)  # is an error now rather than at the first question
        self.model, self.processor = model.eval(), processor
        self.options = endings(processor, model.options().end_tokens) | options
        self.exchanges: list[Exchange] = []
        self.waiting: tuple[Tensor, ...] = ()  # pictures that the next question is about
        self.dropped = 0

    @property
    def turns(self) -> list[Turn]:
        """All that was said and is still remembered."""
        return [turn for e in self.exchanges for turn in (e.user, Turn("assistant", e.answer))]

    def see(self, picture: Picture) -> None:
        """Show a picture; the next question is about it. UserError: it cannot be read, or the model cannot see."""
        check_answerer(self.model, self.processor, images=1)
        self.waiting = (*self.waiting, self.processor.images([picture]))

    def say(self, text: str) -> Iterator[str]:
        """The answer in pieces, as they come. Whoever stops listening (`close`, Ctrl-C) leaves it as far as it came.

        An answer of which nothing came is not remembered, and its pictures wait for the next question.
        UserError, and nothing has changed: an empty question, one with `<image>` marks, one that does not fit the context.
        """
        if not text.strip():
            raise UserError("the question is empty; say something.")
        if PLACEHOLDER in text and can_see(self.model):
            raise UserError(
                f"{PLACEHOLDER} marks are put in front of the question by themselves: show the picture, then ask."
            )
        exchanges, question, tokens = self.remember(Exchange(self.waiting, text))
        pixels = [p for e in (*exchanges, question) for p in e.pixels]
        check_one_picture([pixels], self.model)
        options = fitting(self.model, len(tokens), len(pixels), self.processor, self.options)
        self.dropped, self.exchanges = len(self.exchanges) - len(exchanges), exchanges
        self.waiting = question.pixels
        return self.speak(question, tokens, torch.cat(pixels) if pixels else None, options)

    def remember(self, question: Exchange) -> tuple[list[Exchange], Exchange, list[int]]:
        """As many of the exchanges as the context has room for, the question, and the tokens of both."""
        exchanges, context = self.exchanges, language_config(self.model).context
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

    def speak(self, question: Exchange, tokens: list[int], pixels: Tensor | None, options: Options) -> Iterator[str]:
        said = ""
        text = TextStream(self.processor.decode, options.stop, words=self.processor.tidies)
        try:
            for token in self.tokens(tokens, pixels, options):
                piece = text.feed(token)
                if piece:
                    said += piece
                    yield piece
            if piece := text.end():
                said += piece
                yield piece
        finally:
            if said.strip():
                self.exchanges = [*self.exchanges, replace(question, answer=as_text(said.strip()))]
                self.waiting = ()

    def tokens(self, prompt: list[int], pixels: Tensor | None, options: Options) -> Iterator[int]:
        """Token after token, up to the one that ends the answer. Beam search knows them at the end only."""
        how = {**vars(options), "decode": self.processor.decode}
        inputs = model_inputs([prompt], pixels, self.model, self.processor)
        columns = self.model.generate(*inputs, **how).T if options.num_beams > 1 else self.model.stream(*inputs, **how)
        for column in columns:
            if (token := int(column[0])) in options.end_tokens:
                return
            yield token
