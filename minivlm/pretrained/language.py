"""The common parts of transformers' language models: special tokens, a tokeniser that fits, and whose the head is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.pretrained import preprocessing
from minivlm.pretrained.chat_template import with_chat_template
from minivlm.pretrained.names import Row, find
from minivlm.processor import Processor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# ---- config ----------------------------------------------------------------------------------------------------------


def read_special_tokens(values: dict[str, Any]) -> dict[str, Any]:
    """eos_token_id (a number, several, or none) and pad_token_id → the fields of `LanguageModelConfig`."""
    end, pad = values.get("eos_token_id"), values.get("pad_token_id")
    ends = () if end is None else tuple(end) if isinstance(end, list) else (end,)
    if pad is None or pad < 0:  # the first LLaMAs have −1, which is no token
        pad = ends[0] if ends else 0
    return {"end_tokens": ends, "pad_token": pad}


def write_special_tokens(config: LanguageModelConfig) -> dict[str, Any]:
    ends = list(config.end_tokens)
    end = ends if len(ends) > 1 else ends[0] if ends else None
    return {"bos_token_id": None, "eos_token_id": end, "pad_token_id": config.pad_token}


def kind_of(config: LanguageModelConfig) -> str:
    """The model_type that comes nearest. What it cannot say is found by reading it back (see `pretrained.write`)."""
    if config.alibi:
        return "mpt"
    if config.rope_theta is None:
        return "opt" if config.position_offset else "gpt2"
    if config.norm == "layernorm":
        return "gpt_neox"
    return "qwen2" if config.qkv_bias and not config.out_bias else "llama"


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, config: LanguageModelConfig, source: Tokenizer | bytes | None) -> Processor:
    """For texts alone. source: the tokeniser, as `Processor` takes it."""
    vocab = vocabulary(source, directory)
    check_vocabulary(vocab, config)
    text = {"context": config.context, "answer_end": answer_end(vocab, config)}
    processor = preprocessing.make_processor(directory, source, pad=config.pad_token, **text)
    return with_chat_template(processor, directory)


class Vocabulary(dict[str, int]):
    """Token → id. added: those that stand beside the words, such as placeholders and padding."""

    added: frozenset[str] = frozenset()

    @classmethod
    def of(cls, words: Mapping[str, int], added: Mapping[str, int]) -> Vocabulary:
        vocab = cls({**words, **added})
        vocab.added = frozenset(added)
        return vocab


def vocabulary(source: Tokenizer | bytes | None, directory: Path) -> Vocabulary:
    """Read from the JSON alone: to build the tokeniser takes several times as long. No tokeniser: {}."""
    if source is None:
        return Vocabulary()
    if not isinstance(source, bytes):
        added = source.get_added_tokens_decoder()
        return Vocabulary.of(source.get_vocab(), {token.content: id for id, token in added.items()})
    try:
        values = json.loads(source)
        vocab = values["model"]["vocab"]
        if isinstance(vocab, list):  # a unigram model: [token, score] in the order of the ids
            vocab = {token: i for i, (token, _) in enumerate(vocab)}
        return Vocabulary.of(vocab, {token["content"]: token["id"] for token in values["added_tokens"]})
    except (KeyError, TypeError, ValueError) as error:
        path = directory / "tokenizer.json"
        raise UserError(f"{path} cannot be read as a tokeniser ({type(error).__name__}: {error}).") from error


def answer_end(vocab: Vocabulary, config: LanguageModelConfig) -> int | None:
    """The first of the model's end tokens that the tokeniser has."""
    return next((end for end in config.end_tokens if end in vocab.values()), None)


def check_vocabulary(vocab: Vocabulary, config: LanguageModelConfig, placeholder: str | None = None) -> None:
    """UserError for a tokeniser with words that the model has no embedding for. An added token, of which no text need make
    use, is refused by `TokenEmbedding` where one does (BLIP-2's retrieval: `<image>`); but the placeholder needs its row."""
    largest = max(
        (token for token in vocab if token == placeholder or token not in vocab.added), key=vocab.get, default=None
    )
    if largest is not None and vocab[largest] >= config.vocab_size:
        raise UserError(
            f"the tokeniser is not the model's: {largest!r} is token {vocab[largest]}, but vocab_size in config.json "
            f"is {config.vocab_size}, so the last is token {config.vocab_size - 1}."
        )


def check_placeholder(vocab: Vocabulary, placeholder: str, token: int, directory: Path, said: str) -> None:
    """UserError if the token that stands for an image is not the one that the model takes for it, which `said` names."""
    if vocab and (given := vocab.get(placeholder)) != token:
        its = f"has no token {placeholder!r}" if given is None else f"gives {placeholder!r} the id {given}"
        raise UserError(f"the tokeniser in {directory} {its}, but {said} {token}.")


# ---- weights ---------------------------------------------------------------------------------------------------------


def has_own_head(weights: Mapping[str, Tensor], rows: list[Row], prefix: str) -> bool:
    """Does the file hold a head besides the embedding, and other numbers in it? Then the two are not tied, whatever the
    config says (transformers 5 decides likewise)."""
    names = [find(rows, f"{prefix}{name}.weight")[0] for name in ("token_embedding", "head")]
    stored = [[name for name in spellings if name in weights][:1] for spellings in names]
    return all(stored) and not torch.equal(*(weights[name] for [name] in stored))
