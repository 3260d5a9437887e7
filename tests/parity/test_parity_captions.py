"""Scores of captions beside the official evaluation of COCO: its Python, and its Java programs where Java is installed."""

import random
import shutil
import string

import numpy as np
import pytest

from minivlm.metrics.caption_scores import caption_scores, scores_of_tokens
from minivlm.metrics.meteor import meteor_value
from minivlm.metrics.ptb_tokenizer import tokenise_captions
from minivlm.metrics.samples import VALUES

pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed (default-jre-headless)")

ODD = [
    "don't",
    "gonna",
    "cannot",
    "'tis",
    "it's",
    "dogs'",
    '"the',
    'sign"',
    "'quoted'",
    "“curly”",
    "‘single’",
    "—",
    "–",
    "--",
    "...",
    "…",
    "!",
    "?!",
    "1,000",
    "3.5",
    "1/2",
    "$5",
    "$1,000.50",
    "50%",
    "#1",
    "#tag",
    "@user",
    "a@b.com",
    "http://www.x.com/y",
    "www.foo.org",
    "U.S.",
    "Mr.",
    "Dr.",
    "St.",
    "a.m.",
    "e.g.",
    "etc.",
    "No.",
    "5",
    ":)",
    ":-(",
    "^_^",
    "café",
    "Zoë",
    "一只猫",
    "日本",
    "Привет",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "<b>",
    "&",
    "AT&T",
    "&amp;",
    "well-known",
    "2-year-old",
    "t-shirt's",
    "10:30pm",
    "5'10\"",
    "20's",
    "'90s",
    "3rd",
    "½",
    "1½",
    "and/or",
    "w/o",
    "a\\b",
    "|",
    "/",
    "*",
    "+",
    "=",
    "~",
    "_",
    "a_b",
    "C++",
    "US$",
    "€5",
    "5¢",
    "°",
    "™",
    "J.",
    "A.",
    "y'all",
    "ma'am",
    "O'Brien",
    "'n'",
    "'em",
    "ol'",
    "555-1234",
    "1/2/2014",
    "img.jpg",
    "24/7",
    "it’s",
    "don’t",
    "😀",
    "♥",
    "•",
    "§",
    ".5",
    "-5",
    "2)",
    "(1)",
    "it?",
    "yes;",
]
WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "man",
    "woman",
    "red",
    "small",
    "on",
    "in",
    "of",
    "with",
    "and",
    "sits",
    "rides",
    "looks",
    "street",
    "table",
    "train",
    "kite",
    "Two",
    "People",
    "sign",
]


def captions(n, odd, seed=0):
    """Random captions, of which a share of the words is odd; and of those some are glued to the next."""
    rng = random.Random(seed)
    word = lambda: rng.choice(ODD) if rng.random() < odd else rng.choice(WORDS)
    space = lambda: " " if rng.random() > odd / 4 else rng.choice(["", "  ", ".", ", ", "-", "'"])
    return ["".join(word() + space() for _ in range(rng.randint(3, 14))) for _ in range(n)]


def images(n, odd, seed=0):
    rng, known = random.Random(seed), captions(4 * n, odd, seed)
    return captions(n, odd, seed + 1), [known[4 * i : 4 * i + rng.randint(1, 4)] for i in range(n)]


def official(scorer, texts, references, **more):
    return scorer.compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(texts)}, **more)


def official_tokens(texts):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    return [found[i][0] for i in range(len(texts))]


def test_scores_of_tokens_are_those_of_pycocoevalcap_for_the_set_and_for_each_image():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    texts, references = images(200, odd=0.1)
    texts[3], references[5] = "", ["", "a dog"]
    scores = scores_of_tokens(texts, references)
    bleu, bleus = official(Bleu(4), texts, references, verbose=0)
    rouge, cider = official(Rouge(), texts, references), official(Cider(), texts, references)
    expected = {f"BLEU-{n}": (bleu[n - 1], bleus[n - 1]) for n in range(1, 5)} | {"ROUGE-L": rouge, "CIDEr": cider}
    for name, (value, values) in expected.items():
        samples = scores[name].samples
        assert scores[name].value == pytest.approx(value, abs=1e-12), name
        assert VALUES[samples.kind](samples.statistics) == pytest.approx(np.array(values), abs=1e-12), name


@java
def test_tokens_are_the_official_ones():
    texts = captions(3000, odd=0) + captions(1000, odd=0.3) + [text for text in captions(300, odd=0.5) if text.strip()]
    rng = random.Random(0)
    texts += ["a" + "".join(rng.choice(string.printable[:95]) for _ in range(rng.randint(1, 20))) for _ in range(1000)]
    ours, theirs = tokenise_captions(texts), official_tokens(texts)
    differ = [one for one in zip(texts, ours, theirs, strict=True) if one[1] != one[2]]
    assert len(differ) <= len(texts) / 1000, differ[:5]
    assert not [one for one in differ if one[0] in texts[:3000]]


@java
def test_scores_of_raw_captions_with_meteor_are_those_of_the_official_evaluation():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor

    texts, references = images(40, odd=0.2, seed=7)
    scores = caption_scores(texts, references, names=("BLEU-4", "METEOR", "CIDEr"), notes=(notes := []))
    assert not notes
    known = iter(official_tokens([text for some in references for text in some]))
    tokens, known = official_tokens(texts), [[next(known) for _ in some] for some in references]
    assert scores["BLEU-4"].value == pytest.approx(official(Bleu(4), tokens, known, verbose=0)[0][3], abs=1e-3)
    assert scores["CIDEr"].value == pytest.approx(official(Cider(), tokens, known)[0], abs=1e-3)
    meteor, meteors = official(Meteor(), tokens, known)
    assert scores["METEOR"].value == pytest.approx(meteor, abs=1e-9)
    assert meteor_value(scores["METEOR"].samples.statistics) == pytest.approx(np.array(meteors), abs=1e-9)
    low, high = scores["METEOR"].interval
    assert low < scores["METEOR"].value < high
