"""Captions as the official evaluation of COCO takes them apart into tokens, after the Penn Treebank (Marcus et al. 1993).

    "They don't sell a $5 T-shirt (or hat)."  →  they do n't sell a $ 5 t-shirt -lrb- or hat -rrb-

Punctuation is left out and the rest is written in small letters. What the official program does was learned from what it
answers to some hundred thousand texts; tests/parity asks it again.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from minivlm.metrics.ptb_rules import DIGIT, LETTER, RULES, SYMBOL, Q
from minivlm.metrics.ptb_words import (
    ABBREVIATIONS,
    CAPITAL_ABBREVIATIONS,
    FINAL_ABBREVIATIONS,
    MARKS,
    NOT_IN_CAPITALS,
    SIGNS,
    SPLIT,
    SYMBOLS,
)

# The official list has brackets in capitals, which meet no small token: so they stay.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
QUOTES = {"`": "`"}
for signs, name in (("‘‹‛\x91", "`"), ("’›\x92", "'"), ("“«\x93", "``"), ('”»\x94"', "''")):
    QUOTES |= dict.fromkeys(signs, name)
WRITTEN = QUOTES | {sign: name for sign, _, name in (pair.partition("=") for pair in SIGNS.split())}
SPACES = re.compile("[\t\v\f\r\n\x1c-\x1f\x85\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
PLAIN = re.compile(r"[A-Za-z, ]*\.?[ ]*")
HALVES = {one + other: (one, other) for one, other in (pair.split("|") for pair in SPLIT.split())}
KNOWN = frozenset(f"{ABBREVIATIONS} {FINAL_ABBREVIATIONS} {CAPITAL_ABBREVIATIONS} {NOT_IN_CAPITALS}".split())


def tokenise_captions(texts: Sequence[str]) -> list[str]:
    """The tokens of each text, with spaces between them.

    The texts are lines of one page, as in the official evaluation: whether "reads K." ends with an initial is told by the first
    word of the next text. Line breaks and tabs within a text are spaces.
    """
    lines = [text if text.isascii() and text.isprintable() else SPACES.sub(" ", text) for text in texts]
    found = []
    for i, line in enumerate(lines):
        words = plain_tokens(line)
        found.append(" ".join(tokens(line, lines, i) if words is None else words))
    return found


def plain_tokens(line: str) -> list[str] | None:
    """Of letters, commas and a full stop at the end, as most captions are: quickly. None: it needs the rules."""
    if not PLAIN.fullmatch(line):
        return None
    words = line.lower().replace(",", " ").rstrip(" .").split()
    if words and "." in line and (len(words[-1]) == 1 or words[-1] in KNOWN):
        return None
    if not HALVES.keys().isdisjoint(words):
        return [half for word in words for half in HALVES.get(word, (word,))]
    return words


def tokens(line: str, lines: Sequence[str], i: int) -> Iterator[str]:
    """The tokens of line i."""
    text = line + "\n" + next((one for one in lines[i + 1 :] if one.strip()), "")
    shown = text if text.isascii() else text.translate(CLASSES)
    at = 0
    while at < len(line):
        first = shown[at]
        if first.isspace():
            at += 1
            continue
        kind = "letter" if first.isalpha() else "digit" if first.isdigit() else "mark"
        longest = max(filter(None, (rule.match(shown, at) for rule in RULES[kind])), key=re.Match.end)
        token = written(text[at : longest.end(1)])
        at = longest.end(1)
        if token and token not in PUNCTUATION:
            yield token


def written(token: str) -> str:
    """As it stands among the tokens: small, with signs, quotes and spaces replaced."""
    if token in WRITTEN:
        return WRITTEN[token]
    if len(token) > 1 and all(sign in QUOTES for sign in token):
        return "".join(QUOTES[sign] for sign in token)
    if re.fullmatch(r"-{2,4}|\.{3,}|\. \. \.", token):
        return "--"
    if re.fullmatch(rf"{Q}(?i:s|m|d|re|ve|ll)|(?i:n{Q}t)", token):
        token = re.sub(Q, "'", token)
    elif token.lower() == "n‘t":
        token = "n`t"
    elif "@" not in token:
        token = token.replace("&amp;", "&")  # AT&amp;T
    if not token.endswith(">"):  # no tag
        token = token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token.replace(" ", "\xa0").replace("\xad", "").lower()


class Classes(dict):
    """For `str.translate`: each character beyond ASCII as the one by which the rules know its kind."""

    def __missing__(self, number: int) -> str:
        self[number] = self.kind(number, chr(number))
        return self[number]

    def kind(self, number: int, character: str) -> str:
        category = unicodedata.category(character)
        if number < 127 or character in WRITTEN:
            return character
        if number > 0xFFFF:  # an emoji, say: the official program leaves it out
            return " "
        if category[0] == "L" or number in MARK_NUMBERS:
            return LETTER
        if category == "Nd":
            return DIGIT
        return SYMBOL if number in SYMBOL_NUMBERS else " "


def numbers(ranges: str) -> frozenset[int]:
    ends = [[int(end, 16) for end in one.split("-")] for one in ranges.split()]
    return frozenset(number for pair in ends for number in range(pair[0], pair[-1] + 1))


MARK_NUMBERS, SYMBOL_NUMBERS, CLASSES = numbers(MARKS), numbers(SYMBOLS), Classes()
