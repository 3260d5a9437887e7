"""Text as it comes: the tokens of an answer become text while the rest is still being generated (`generation.stream`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minivlm.generation import Decode

HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to while the rest of their character is still to come


class TextStream:
    """Turns a row's tokens into pieces of text as they come, each piece final.

    Held back is what may still change: bytes of a character that is not complete, what could be the beginning of a stop
    string, and, with `words`, the last word, which may yet lose the space before it. `text` is the whole text, the held
    back end included, and ends in front of the first stop string.

        text = TextStream(processor.decode, stop=("USER:",))
        for token in stream(…):
            print(text.feed(token), end="", flush=True)
        print(text.end())
    """

    def __init__(self, decode: Decode, stop: Sequence[str] = (), *, words: bool = False):
        self.decode, self.stop, self.words = decode, stop, words
        self.text, self.stopped = "", False
        self.tokens: list[int] = []
        self.given = 0  # characters of the text that were handed out

    def feed(self, token: int | Tensor) -> str:
        """The next token of the row → the text that is final now and was not before; "" once stopped."""
        if self.stopped:
            return ""
        self.tokens.append(int(token))
        self.text = self.decode([self.tokens])[0]
        starts = [self.text.find(s) for s in self.stop if s in self.text]
        if starts:
            self.stopped = True
            self.text = self.text[: min(starts)]
            return self.end()
        whole = self.text.rstrip(HALF_CHARACTER)
        if self.words:
            whole = whole[: max(0, whole.rstrip().rfind(" "))]
        begun = [n for s in self.stop for n in range(1, len(s)) if whole.endswith(s[:n])]
        return self.give(len(whole) - max(begun, default=0))

    def end(self) -> str:
        """No token follows → what was held back."""
        return self.give(len(self.text))

    def give(self, until: int) -> str:
        piece = self.text[self.given : until]
        self.given = max(self.given, until)
        return piece
