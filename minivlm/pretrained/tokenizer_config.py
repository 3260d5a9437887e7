"""tokenizer_config.json beside tokenizer.json: what the tokeniser's class changes in the file, as transformers does when it
reads the two.

    do_lower_case, strip_accents, tokenize_chinese_chars    BERT's normaliser is made of them
    do_lower_case                                           SigLIP's, and Gemma's beside a SigLIP 2
    add_prefix_space                                        of byte-level BPE (GPT-2, GPT-NeoX, Qwen2) and of LLaMA's
    added_tokens_decoder                                    tokens that tokenizer.json lacks
    add_bos_token, add_eos_token                            without effect beside a tokenizer.json: its post-processor counts
    tokenizer_class                                         what stands in for a part that tokenizer.json leaves out (null)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.files import read_json

Values = dict[str, Any]

CLIP_FRAME = ("<|startoftext|>", "<|endoftext|>")
# Words, as the code of OpenAI tells them apart.
CLIP_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read_about(directory: Path) -> Values:
    path = directory / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def follow(source: bytes, about: Mapping[str, Any], family: str | None, path: Path) -> bytes:
    """tokenizer.json as `about`, what tokenizer_config.json says, changes it. family: its class, where it names none."""
    named = about.get("tokenizer_class")
    kind = str(named or family or "").removesuffix("Fast")
    if kind not in CLASSES and not about.get("added_tokens_decoder"):
        return source
    try:
        values = json.loads(source)
        before = json.dumps(values)
        if kind in CLASSES:
            CLASSES[kind](values, about)
        said = f"tokenizer_config.json gives {{!r}} the number {{}}, but beside {path} it is {{}}."
        add_tokens(values, about.get("added_tokens_decoder") or {}, said)
        return source if json.dumps(values) == before else json.dumps(values, ensure_ascii=False).encode()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a tokeniser ({type(error).__name__}: {error}).") from error


# ---- the classes -----------------------------------------------------------------------------------------------------


def bert(values: Values, about: Mapping[str, Any]) -> None:
    """[CLS] text [SEP]."""
    normalizer = values.get("normalizer") or {"type": "BertNormalizer"}
    if normalizer["type"] == "BertNormalizer" and (about or values.get("normalizer") is None):
        normalizer = {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": about.get("tokenize_chinese_chars", True),
            "strip_accents": about.get("strip_accents"),
            "lowercase": about.get("do_lower_case", True),
        }
    values["normalizer"] = normalizer
    fill(values, "pre_tokenizer", {"type": "BertPreTokenizer"})
    fill(values, "decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True})
    frame(values, spelt(about, "cls_token", "[CLS]"), spelt(about, "sep_token", "[SEP]"))


def clip(values: Values, about: Mapping[str, Any]) -> None:
    """<|startoftext|> text <|endoftext|>, in lower case."""
    spaces = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    fill(values, "normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, spaces, {"type": "Lowercase"}]})
    split = {"type": "Split", "pattern": {"Regex": CLIP_SPLIT}, "behavior": "Removed", "invert": True}
    fill(values, "pre_tokenizer", {"type": "Sequence", "pretokenizers": [split, byte_level()]})
    fill(values, "decoder", byte_level())
    frame(values, spelt(about, "bos_token", CLIP_FRAME[0]), spelt(about, "eos_token", CLIP_FRAME[1]))


def t5(values: Values, about: Mapping[str, Any]) -> None:
    """text </s>."""
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    fill(values, "pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]})
    fill(values, "decoder", space)
    frame(values, None, "</s>")


def siglip(values: Values, about: Mapping[str, Any]) -> None:
    """text </s>, in lower case unless do_lower_case is false."""
    normalizer = values.get("normalizer") or {}
    if not about.get("do_lower_case", True) and "normalizers" in normalizer:
        normalizer["normalizers"] = [step for step in normalizer["normalizers"] if step["type"] != "Lowercase"]
    frame(values, None, spelt(about, "eos_token", "</s>"))


def gemma(values: Values, about: Mapping[str, Any]) -> None:
    """SigLIP 2 has Gemma's tokeniser and was trained on texts in lower case. Its files say do_lower_case, which transformers
    follows where they name the class Siglip2Tokenizer (its issue 43054)."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    fill(values, "normalizer", space)
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    fill(values, "pre_tokenizer", split)
    words = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    fill(values, "decoder", {"type": "Sequence", "decoders": [words, {"type": "ByteFallback"}, {"type": "Fuse"}]})
    if about.get("do_lower_case") and "Lowercase" not in json.dumps(values["normalizer"]):
        values["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, values["normalizer"]]}


def siglip2(values: Values, about: Mapping[str, Any]) -> None:
    gemma(values, {**about, "do_lower_case": True})


def gpt2(values: Values, about: Mapping[str, Any]) -> None:
    fill(values, "pre_tokenizer", byte_level())
    fill(values, "decoder", byte_level())
    if about:
        prefix_space(values["pre_tokenizer"], bool(about.get("add_prefix_space")))


def gpt_neox(values: Values, about: Mapping[str, Any]) -> None:
    """Nothing is put before or after a text, whatever the file says."""
    gpt2(values, about)
    values["post_processor"] = None


def llama(values: Values, about: Mapping[str, Any]) -> None:
    """The file counts (transformers 5 goes by the class, and reads " a" as "a"), unless a text is not to begin with a space."""
    if values.get("normalizer") is None:
        start = "always" if about.get("legacy") else "first"
        fill(
            values, "pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": start, "split": False}
        )
    if about.get("add_prefix_space") is not False:
        return
    normalizer, words = values.get("normalizer") or {}, values.get("pre_tokenizer") or {}
    if "normalizers" in normalizer:
        normalizer["normalizers"] = [step for step in normalizer["normalizers"] if step["type"] != "Prepend"]
    if words.get("type") == "Metaspace":
        words["prepend_scheme"] = "never"
    decoder = values.get("decoder") or {}
    if "decoders" in decoder:  # nor is one taken away
        decoder["decoders"] = [step for step in decoder["decoders"] if step["type"] != "Strip"]


CLASSES: dict[str, Callable[[Values, Mapping[str, Any]], None]] = {
    "BertTokenizer": bert,
    "CLIPTokenizer": clip,
    "T5Tokenizer": t5,
    "SiglipTokenizer": siglip,
    "Siglip2Tokenizer": siglip2,
    "GemmaTokenizer": gemma,
    "GPT2Tokenizer": gpt2,
    "Qwen2Tokenizer": gpt2,
    "GPTNeoXTokenizer": gpt_neox,
    "LlamaTokenizer": llama,
}

# ---- parts -----------------------------------------------------------------------------------------------------------


def fill(values: Values, part: str, default: Values) -> None:
    if values.get(part) is None:
        values[part] = default


def byte_level() -> Values:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def prefix_space(words: Values, wanted: bool) -> None:
    for step in words.get("pretokenizers", [words]):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = wanted


def frame(values: Values, start: str | None, end: str | None) -> None:
    """Set the tokens before and after every text, where the file leaves them out. UserError if there is no such token."""
    if values.get("post_processor") is not None:
        return
    ids = {**words_of(values), **{token["content"]: token["id"] for token in values["added_tokens"]}}
    frame_tokens = {
        name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (start, end) if name is not None
    }
    piece = lambda kind, name, part: {kind: {"id": name, "type_id": part}}
    before = [] if start is None else [piece("SpecialToken", start, 0)]
    after = lambda part: [] if end is None else [piece("SpecialToken", end, part)]
    single = [*before, piece("Sequence", "A", 0), *after(0)]
    pair = [*single, piece("Sequence", "B", 1), *after(1)]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": frame_tokens,
    }


def words_of(values: Values) -> dict[str, int]:
    vocab = values["model"]["vocab"]
    return {token: i for i, (token, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab


def spelt(about: Mapping[str, Any], name: str, default: str) -> str:
    token = about.get(name) or default
    return token["content"] if isinstance(token, dict) else token


def add_tokens(values: Values, given: Mapping[Any, Any], problem: str) -> None:
    """Add tokens (id → token) that the tokeniser lacks, such as the placeholder of an image. UserError, as `problem` says
    it of token, wanted id and actual id, where one would get another id."""
    added, words = values["added_tokens"], words_of(values)
    known = {token["content"] for token in added}
    for id, token in sorted(given.items(), key=lambda item: int(item[0])):
        if (content := token["content"]) in known:
            continue
        free = max([len(words), *(token["id"] + 1 for token in added)])
        if (its := words.get(content, free)) != int(id):
            raise UserError(problem.format(content, id, its))
        flags = {name: bool(token.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        added.append({"id": its, "content": content, **flags})


def word_pieces(lines: list[str], about: Mapping[str, Any]) -> bytes:
    """BERT's vocab.txt, a token a line → its tokenizer.json."""
    special = [spelt(about, f"{name}_token", f"[{name.upper()}]") for name in ("unk", "sep", "pad", "cls", "mask")]
    model = {"type": "WordPiece", "unk_token": special[0], "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": {token: i for i, token in enumerate(lines)}}
    values = bare(model, special)
    bert(values, about)
    return json.dumps(values, ensure_ascii=False).encode()


def byte_pairs(
    family: str,
    vocab: dict[str, int],
    merges: list[list[str]],
    special: Sequence[str],
    start: str | None,
    about: Mapping[str, Any],
) -> Values:
    """CLIP's or GPT-2's vocab.json and merges.txt → the values of tokenizer.json. start: put before every text."""
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "dropout": None, "continuing_subword_prefix": None}
    ending = {"unk_token": CLIP_FRAME[1], "end_of_word_suffix": "</w>"} if family == "CLIPTokenizer" else {}
    values = bare({**model, "unk_token": None, "end_of_word_suffix": None, "fuse_unk": False, **ending}, special)
    CLASSES[family](values, about)
    if start is not None:
        frame(values, start, None)
    return values


def bare(model: Values, special: Sequence[str]) -> Values:
    """A tokenizer.json of a vocabulary and special tokens alone."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = model["vocab"]
    added = [{"id": ids[token], "content": token, **flags} for token in special if token in ids]
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **parts, "added_tokens": added, "model": model}
