"""The tokens of `ptb_tokenizer.py`, as regular expressions: what begins with a letter, with a digit, with anything else.

A rule is a pattern whose first group is the token; the rest is what has to follow it. The longest match counts, what has to
follow included; of equally long ones the first. The rules see letters and digits beyond ASCII as é and ٣, symbols as §.
"""

from __future__ import annotations

import re

from minivlm.metrics.ptb_words import (
    ABBREVIATIONS,
    BEFORE_NUMBERS,
    CAPITAL_ABBREVIATIONS,
    EXTENSIONS,
    FINAL_ABBREVIATIONS,
    NOT_IN_CAPITALS,
    SPLIT,
    STARTERS,
    WITH_APOSTROPHE,
)

LETTER, DIGIT, SYMBOL = "é", "٣", "§"


def any_of(words: str) -> str:
    return f"(?:{'|'.join(sorted(words.split(), key=len, reverse=True))})"


def spelt(words: str) -> str:
    """With a capital, or in capitals."""
    return any_of(f"{words.title()} {words.upper()}")


L, D, A = "[A-Za-zé]", "[0-9٣]", "[A-Za-z0-9é٣]"  # letters, digits, both
a = "[A-Za-z0-9]"  # of ASCII alone
Q, QQ = "(?:['’\x92]|&apos;)", "(?:['’\x92`‘]|&apos;)"  # apostrophes, and what is taken for one inside a word
THERE = "(?![A-Za-z])"  # a word ends here
WORD = f"{L}{A}*(?:[.!?]{L}{A}*)*"  # with sentences that follow each other without a space
PART = f"(?:[dDoOlL]{QQ}{A})?{A}+"
PARTS = f"{PART}(?:[-_‐‑]{PART})*"  # dog, 2-year-old, vue-d'oiseau
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
DOTTED = rf"{a}[A-Za-z0-9.,]*(?:-(?:{ACRONYM}\.|{a}+))+"  # U.S.-based, 1,000-year
ADDRESS = r"[^\s\"<>|(){}]"
PATH = rf"{ADDRESS}+[^\s\"<>|(){{}}.!?,-]"
EMAIL = rf"{a}{ADDRESS}*@(?:[^\s\"<>|(){{}}.]+\.)*[^\s\"<>|(){{}}.]+"
HOST = "[a-zé§#%&*+~]+"
NAME = r"[A-Za-z][\w:.-]*"  # of a tag or an attribute
ATTRIBUTE = rf"{NAME}(?:[ ]*=[ ]*(?:\"[^\"\n]*\"|'[^'\n]*'))?"
TAG = rf"(?:<[!?][A-Za-z-][^>\n]*>|</{NAME}[ ]*>|<{NAME}(?:[ ]+{ATTRIBUTE})*[ ]*/?[ ]*>)"
CHEEK = "[-^x=~<>']"  # of ^_^

SITES = [rf"((?:{HOST}\.)+(?:com|net|org|edu)(?:/{PATH})?)"]
LETTERS = [
    *(f"((?i:{one}))(?i:{other})" for one, other in (pair.split("|") for pair in SPLIT.split())),  # can, of cannot
    f"({L}+){Q}(?i:s|m|d|re|ve|ll)",
    f"({PARTS})",
    f"({WORD})",
    rf"((?i:{any_of(FINAL_ABBREVIATIONS)})\.)(?s:..)?",  # as long as "ct.n "
]
COMPOUND = [
    f"({DOTTED})",
    rf"({a}+(?:-[A-Za-z]+){{0,2}}(?:\\?/{a}+(?:-[A-Za-z]+){{0,2}}){{1,2}})",  # and/or, 1/2/2014
    rf"({a}+\.(?i:{any_of(EXTENSIONS)}))(?=[\s!?.,])",
    rf"((?:{WORD}|{PARTS}|{DOTTED})\.)[,;:]",  # yds., and other abbreviations that another mark follows
    f"({EMAIL}>?)",
]
WORDS = [
    rf"({L}*(?![nN]){L})(?i:n{QQ}t)",  # do, of don't
    f"((?i:n{QQ}t)){THERE}",
    rf"((?i:ph\.d|{any_of(ABBREVIATIONS)})\.)",
    rf"({spelt(CAPITAL_ABBREVIATIONS)}\.|{any_of(f'{NOT_IN_CAPITALS} {NOT_IN_CAPITALS.title()}')}\.)",
    rf"((?i:{any_of(BEFORE_NUMBERS)})\.)\s?{D}",
    rf"({ACRONYM}\.)",
    rf"([A-Za-z]\.)(?![ \n]+(?:{spelt(STARTERS)}(?:[ \n]|$)|{TAG}))",  # J. Smith, but not "reads A. The dog"
    rf"([A-HJ-XZn]{QQ}{L}{{2,}}|{L}+[AEIOUYaeiouy]{QQ}[aeiouA-Z]{L}*)",  # B'nai, ma'am
    rf"([oO]{QQ}[oO]|(?i:cap){Q}n|(?i:{any_of(WITH_APOSTROPHE)}))",
    rf"([dDlLjJ]{Q}|[yY]{Q}(?={L})|(?i:dunkin|somethin|ol){Q})",
    r"([A-Z]+(?:(?:[&+]|&amp;)[A-Z]+)+|(?i:c\+\+|[cf]#)|[A-Z]+\$)",  # AT&T, C++, US$
    rf"((?i:https?)://{PATH}|(?i:www)\.(?:[^\s\"<>|.!?(){{}},]+\.)+[A-Za-z]{{2,4}}(?:/{PATH})?)",
    f"(x_{CHEEK})",
]
NUMBERS = [
    f"([-+]?{D}*(?:[.,:]{D}+)+|[-+]?{D}+)",
    f"({D}{{1,4}}[- ]{D}{{1,4}}/{D}{{1,4}}|{D}{{1,2}}[-/]{D}{{1,2}}[-/]{D}{{2,4}})",  # 2 1/2, 1/2-2014
    rf"({D}{{3}}[ ]{D}{{3}}[- ]{D}{{4}}|\({D}{{3}}\)[ ]?{D}{{3}}[- ]{D}{{4}})",
]
MARKS = [
    f"({Q}(?i:s|m|d|re|ve|ll)){THERE}",
    r"([’\x92](?i:s|m|d|re|ve|ll))",
    f"({Q}(?i:em|till?|cause)|'(?i:t)(?=(?i:is|was)))",
    rf"({Q}[nN]{Q}|{Q}[nN](?=\s)|{Q}[2-9]0s|{Q}{D}{D}(?=\s))",  # rock 'n' roll, '90s
    f"({TAG})",
    f"(<{EMAIL}>?)",
    r"([<>]?[:;=][-o*']?[]()\\[{@DOPdp|])(?![A-Za-z0-9])",  # :-)
    rf"({CHEEK}_{CHEEK}|\({CHEEK}[-_.]?{CHEEK}\))",
    r"(\.{3,}|\.[ ]\.[ ]\.|[?!]+|--+|(?:\\\*)+|\*+|_+|\#+|@+|<<|>>|''|[`‘’“”‹›«»]{2})",
    rf"(\#{L}+|@[A-Za-z_]\w*)",
    rf"(&(?:{any_of('amp lt gt nbsp quot apos mdash ndash')}|\#\d+);)",
    r"(\S)",
]
RULES = {
    kind: [re.compile(rule) for rule in rules]
    for kind, rules in {
        "letter": LETTERS + COMPOUND + WORDS + SITES,
        "digit": [f"({PARTS})", *COMPOUND, *NUMBERS],
        "mark": NUMBERS + SITES + MARKS,
    }.items()
}
