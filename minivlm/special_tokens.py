"""Text that is text: what data or users spell never becomes a special token; these are put in by the program.

    ["<|im_start|>user\\n", "what is </s>?", "<|im_end|>"]      a list of pieces is one text
      Markup                 str               Markup          a token's name is that token in Markup alone

Such a text is tokenised as the one string that it is, so a text without special tokens has the ids that the published
tokeniser gives it. Only where more special tokens come out of it than its Markup has is it tokenised again, by a copy of
the tokeniser in which all special tokens have secret names.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from minivlm.files import valid_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PLACEHOLDER = "<image>"  # where an image stands in a prompt
TAG = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)  # what a special token that is not called so looks like
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # stands for a byte of a sign that has no token
WORD = "\ufdd0"  # in an `<image>` that is text, behind its first character; a code point that stands for no character


class Markup(str):
    """A string of the program's own, in which the names of special tokens are these tokens."""


Text = str | Sequence[str]  # one string, or pieces of Markup and text


def as_text(text: str) -> str:
    """The text where `<image>` would stand for an image: here it is plain text."""
    return text.replace(PLACEHOLDER, PLACEHOLDER[0] + WORD + PLACEHOLDER[1:])


def split_placeholders(text: str, *placeholders: str) -> list[str]:
    """A prompt as pieces: its placeholders (by default `<image>`) are Markup, all else is text."""
    placeholders = placeholders or (PLACEHOLDER,)
    pieces = re.split(f"({'|'.join(map(re.escape, placeholders))})", text)
    return [Markup(piece) if i % 2 else piece.replace(WORD, "") for i, piece in enumerate(pieces)]


def without_placeholders(text: str) -> str:
    """The text of a prompt, without the placeholders of its images."""
    return "".join(piece for piece in split_placeholders(text) if not isinstance(piece, Markup)).strip()


class SpecialTokens:
    """The tokens of a tokeniser that no text may spell: all that it calls special, the added ones among `more`, and those
    that the chat template `markup` is written with."""

    def __init__(self, tokenizer: Tokenizer, more: Collection[str] = (), markup: str = ""):
        self.tokenizer, self.size = tokenizer, tokenizer.get_vocab_size()
        added = tokenizer.get_added_tokens_decoder()
        tag = lambda name: name in more or (name in markup and TAG.fullmatch(name))
        self.names = {i: token.content for i, token in added.items() if token.special or tag(token.content)}
        self.ids = {name: i for i, name in self.names.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)  # as the tokeniser itself finds them
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # What stands for signs that have no token comes out of texts that do not spell it.
        unknown = getattr(tokenizer.model, "unk_token", None)
        spares = [name for name in longest_first if name == unknown or BYTE.fullmatch(name)]
        self.spare = re.compile("|".join(map(re.escape, spares)) or r"(?!)")
        self.unexpected = frozenset(self.names) - {self.ids[name] for name in spares}
        mask = tokenizer.encode("a").special_tokens_mask
        self.before = next((i for i, special in enumerate(mask) if not special), 0)  # tokens put around a text
        self.behind = next((i for i, special in enumerate(reversed(mask)) if not special), 0)

    def encode(self, texts: Sequence[Sequence[str]], *, frame: bool) -> list[list[int]]:
        """The ids of each text, given in pieces; frame: with the tokens that the tokeniser puts around a whole one."""
        strings = [valid_text("".join(text)) for text in texts]
        rows = [e.ids for e in self.tokenizer.encode_batch_fast(strings, add_special_tokens=frame)]
        return [
            row if self.is_clean(text, string, row, frame) else self.encode_anew(text, frame)
            for text, string, row in zip(texts, strings, rows, strict=True)
        ]

    def is_clean(self, text: Sequence[str], string: str, row: list[int], frame: bool) -> bool:
        """Are there no special tokens in it but those of the Markup?"""
        body = row[self.before : len(row) - self.behind] if frame else row
        spelt = self.spare.findall(string)
        if not spelt and self.unexpected.isdisjoint(body):
            return True
        meant = Counter(name for piece in text if isinstance(piece, Markup) for name in self.pattern.findall(piece))
        found = Counter(self.names[token] for token in body if token in self.names)
        return not Counter(spelt) - meant and all(self.spare.fullmatch(name) for name in found - meant)

    def encode_anew(self, text: Sequence[str], frame: bool) -> list[int]:
        copy, secret = self.blind
        hide = lambda piece: self.pattern.sub(lambda name: secret.get(name[0], name[0]), piece)
        string = "".join(hide(piece) if isinstance(piece, Markup) else piece for piece in text)
        return copy.encode(valid_text(string), add_special_tokens=frame).ids

    @cached_property
    def blind(self) -> tuple[Tokenizer, dict[str, str]]:
        """The tokeniser with its special tokens under secret names, and these by their real ones."""
        from tokenizers import Tokenizer

        key = secrets.token_hex(8)  # what is not known cannot be spelt
        secret = {name: f"{WORD}{key}{i}{WORD}" for name, i in self.ids.items() if not BYTE.fullmatch(name)}
        return Tokenizer.from_str(json.dumps(renamed(json.loads(self.tokenizer.to_str()), secret))), secret


def renamed(values: dict[str, Any], secret: dict[str, str]) -> dict[str, Any]:
    """The JSON of a tokeniser whose tokens `secret` have other names, under the same ids."""
    model, new = values["model"], lambda name: secret.get(name, name)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new(token): i for token, i in model["vocab"].items()}
    else:  # of a unigram model, which would find its special tokens in a text as it finds words
        model["vocab"] = [[new(token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = new(model["unk_token"])
    pairs = [(pair, pair if isinstance(pair, list) else pair.split(" ")) for pair in model.get("merges", [])]
    if pairs:
        model["merges"] = [pair for pair, (a, b) in pairs if not {a, b, a + b} & secret.keys()]
    values["added_tokens"] = [token for token in values["added_tokens"] if not BYTE.fullmatch(token["content"])]
    for token in values["added_tokens"]:
        if token["content"] in secret:
            token |= {"content": new(token["content"]), "normalized": False}
    return values
