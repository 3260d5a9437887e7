"""Ids against AutoTokenizer: what tokenizer_config.json changes, and what stands in for parts that tokenizer.json lacks."""

import json

import pytest

from minivlm.pretrained.preprocessing import read_tokenizer
from minivlm.processor import Processor, ProcessorConfig
from tests.pretrained.test_tokenizer_config import bert, bytes_of, write

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

TEXTS = ["Two Cafés, 你好 in 1234  the park!", "two café", " you", "it's\nfine"]
FAMILIES = {  # model_type → the class, the tokeniser, flags to try
    "bert": (
        "BertTokenizer",
        bert,
        [
            {"do_lower_case": False},
            {"strip_accents": False},
            {"strip_accents": True, "do_lower_case": False},
            {"tokenize_chinese_chars": False},
        ],
    ),
    "gpt2": ("GPT2Tokenizer", lambda: bytes_of("<|endoftext|>"), [{"add_prefix_space": True}, {"add_bos_token": True}]),
    "opt": ("GPT2Tokenizer", lambda: bytes_of("<|endoftext|>"), [{"add_prefix_space": True}, {"add_bos_token": True}]),
    "gpt_neox": ("GPTNeoXTokenizer", lambda: bytes_of("<|endoftext|>"), [{"add_prefix_space": True}, {"add_bos_token": True}]),
}  # fmt: skip
CASES = [
    (kind, flags, named)
    for kind, (_, _, every) in FAMILIES.items()
    for flags in [{}, *every]
    for named in (True, False)
]


@pytest.mark.parametrize(("kind", "flags", "named"), CASES, ids=str)
def test_ids_of_every_family(kind, flags, named, tmp_path):
    """With and without a post-processor in tokenizer.json, whose class is named or follows from the model."""
    family, make, _ = FAMILIES[kind]
    write(tmp_path, make(), **({"tokenizer_class": family} if named else {}), **flags)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == family
    ours = Processor(read_tokenizer(tmp_path, family), ProcessorConfig(pad_token=0))
    assert ours.encode(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("flags", [{}, {"do_lower_case": False}], ids=str)
def test_vocab_txt(flags, tmp_path):
    pieces = bert().get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(pieces, key=pieces.get)) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **flags}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Processor(read_tokenizer(tmp_path, "BertTokenizer"), ProcessorConfig(pad_token=0))
    assert ours.encode(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]
