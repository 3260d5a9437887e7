"""The tokeniser in the metadata of a GGUF file → tokenizer.json.

tokenizer.ggml.model    "gpt2": byte-level BPE, whose texts are cut as tokenizer.ggml.pre says; "llama": SentencePiece
tokens, token_type      the words, and which of them are no words of a text
merges, scores          the merges, or what they follow from
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from minivlm.errors import UserError
from minivlm.pretrained.tokenizer_config import bare, byte_level, frame

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # token_type

REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3, QWEN2 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}", rf"{WORDS}|\p{{N}}|{REST}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # tokenizer.ggml.pre → the expression whose matches are words; "digits": GPT-2's, and each digit alone
    "gpt-2": "gpt-2",
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), "digits"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    "tekken": TEKKEN,
}


def read_tokenizer(metadata: Mapping[str, Any], where: str) -> bytes:
    """tokenizer.json. UserError for a tokeniser of another kind."""
    about = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, words = about.get("model"), about.get("tokens")
    if kind not in ("gpt2", "llama") or not words:
        raise UserError(f"{where} has a tokeniser of the kind {kind!r}; of GGUF files gpt2 and llama are supported.")
    kinds = about.get("token_type") or [1] * len(words)
    special = [word for word, type in zip(words, kinds, strict=True) if type in (UNKNOWN, CONTROL)]
    added = [(word, id) for id, (word, type) in enumerate(zip(words, kinds, strict=True)) if type == USER_DEFINED]
    make = byte_pairs if kind == "gpt2" else sentencepiece
    values = make(about, {word: id for id, word in enumerate(words)}, special, where)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    values["added_tokens"] += [{"id": id, "content": word, **flags} for word, id in added]
    values["added_tokens"].sort(key=lambda token: token["id"])
    by_default = kind == "llama" or SPLITS.get(about.get("pre")) == LLAMA3
    name = lambda token, wanted: words[about[token]] if wanted and about.get(token) is not None else None
    start = name("bos_token_id", about.get("add_bos_token", by_default))
    end = name("eos_token_id", about.get("add_eos_token", False))
    if start is not None or end is not None:
        frame(values, start, end)
    return json.dumps(values, ensure_ascii=False).encode()


def byte_pairs(about: Mapping[str, Any], vocab: dict[str, int], special: list[str], where: str) -> dict[str, Any]:
    if (pre := about.get("pre")) not in SPLITS:
        known = ", ".join(SPLITS)
        raise UserError(
            f"{where} cuts texts as tokenizer.ggml.pre = {pre!r} says, which is not supported; there are {known}."
        )
    split, merges = SPLITS[pre], [merge.split(" ") for merge in about["merges"]]
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": split == LLAMA3}
    values = bare(model, special)
    steps = [byte_level()]
    if split == "digits":
        steps = [{"type": "Digits", "individual_digits": True}, *steps]
    elif split != "gpt-2":
        cut = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        steps = [cut, {**byte_level(), "use_regex": False}]
    values["normalizer"] = {"type": "NFC"} if split == QWEN2 else None
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    values["decoder"] = byte_level()
    return values


def sentencepiece(about: Mapping[str, Any], vocab: dict[str, int], special: list[str], where: str) -> dict[str, Any]:
    unknown = about["tokens"][about.get("unknown_token_id", 0)]
    model = {"type": "BPE", "vocab": vocab, "merges": merges_of(about, vocab), "unk_token": unknown}
    values = bare({**model, "fuse_unk": True, "byte_fallback": True}, special)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    word = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    before, behind = [{"type": "Prepend", "prepend": "▁"}], [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    if not about.get("add_space_prefix", True):
        before, behind = [], []
    values["normalizer"] = {"type": "Sequence", "normalizers": [*before, space]}
    values["decoder"] = {"type": "Sequence", "decoders": [word, {"type": "ByteFallback"}, {"type": "Fuse"}, *behind]}
    return values


def merges_of(about: Mapping[str, Any], vocab: dict[str, int]) -> list[list[str]]:
    """The merges of a SentencePiece model: each word out of any two others, those of higher score first."""
    if "merges" in about:
        return [merge.split(" ") for merge in about["merges"]]
    found = []
    for word, score in zip(about["tokens"], about["scores"], strict=True):
        halves = [(word[:i], word[i:]) for i in range(1, len(word))]
        halves = [(a, b) for a, b in halves if a in vocab and b in vocab]
        found += [
            (score, a, b) for a, b in sorted(halves, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]), reverse=True)
        ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [[a, b] for _, a, b in found]


def named_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token … as a chat template asks for them."""
    words = metadata["tokenizer.ggml.tokens"]
    ids = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {name: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in ids.items()}
    return {f"{name}_token": words[id] for name, id in found.items() if id is not None}
