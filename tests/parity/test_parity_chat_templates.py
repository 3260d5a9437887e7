"""Conversations are written as transformers' apply_chat_template writes them, and our own templates are read by it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from minivlm.chat_templates import CHOICES, TEMPLATES
from minivlm.checkpoint import load
from minivlm.conversation import Turn, encode_conversation
from minivlm.pretrained.chat_template import with_chat_template, write_chat_template
from minivlm.processor import Processor, ProcessorConfig
from tests.chats import PUBLISHED, tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

SYSTEM, USER, ANSWER = (
    Turn("system", "You are terse."),
    Turn("user", "who is it?\n\n and  why?"),
    Turn("assistant", "it is me"),
)
CHATS = [
    (USER,),
    (SYSTEM, USER),
    (USER, ANSWER, Turn("user", "is it </s>?")),
    (SYSTEM, USER, ANSWER, Turn("user", "really?"), Turn("assistant", "yes.\nyes"), Turn("user", "no")),
]


def put(directory, made, tokens=(None, None), source=None):
    """A published tokeniser, and what it is in transformers."""
    made.save(str(directory / "tokenizer.json"))
    named = {name: token for name, token in zip(("bos_token", "eos_token"), tokens, strict=True) if token}
    values = {"tokenizer_class": "PreTrainedTokenizerFast", **named, **({"chat_template": source} if source else {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


def expected(theirs, turns, typed=False):
    content = lambda text: [{"type": "text", "text": text}] if typed else text
    messages = [{"role": turn.role, "content": content(turn.text)} for turn in turns]
    return theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def without_special(turns):
    """transformers takes a special token that the user spells for one."""
    return [turn._replace(text=turn.text.replace("</s>", "/s")) for turn in turns]


@pytest.mark.parametrize("kind", ["gpt2", "gpt2 that starts", "llama"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_apply_chat_template(tmp_path, name, kind):
    source, tokens, _ = PUBLISHED[name]
    start = tokens[0] if kind != "gpt2" and tokens[0] not in ("<|endoftext|>", "<|im_start|>") else None
    made = tokenizer(start, prepend=kind == "llama")
    theirs = put(tmp_path, made, tokens, source)
    ours = with_chat_template(Processor(made, ProcessorConfig()), tmp_path)
    for turns in map(without_special, CHATS):
        if turns[0].role == "system" and name in ("mistral", "gemma"):
            continue
        assert encode_conversation(turns, ours, prompt=True).tokens == expected(theirs, turns, typed=name == "llava")


@pytest.mark.parametrize("kind", ["gpt2 that starts", "llama"])
@pytest.mark.parametrize("name", [*CHOICES, "smollm2", "llama-3.1", "mistral, later", "llava"])
def test_what_we_write_renders_the_same_and_is_read_again(tmp_path, name, kind):
    made = tokenizer("<s>" if kind == "gpt2 that starts" else None, prepend=kind == "llama")
    processor = Processor(made, ProcessorConfig(**({"chat": name} if name in CHOICES else {})))
    if name in PUBLISHED:
        put(tmp_path, made, PUBLISHED[name][1], PUBLISHED[name][0])
        processor = with_chat_template(processor, tmp_path)
    if name in ("chatml", "vicuna"):
        processor = Processor(made, replace(processor.config, system="Say little."))
    [(file, source)] = write_chat_template(processor).items()
    (tmp_path / file).write_text(source, encoding="utf-8")
    theirs = put(tmp_path, made, ("<s>" if kind == "gpt2 that starts" else None, "</s>"))
    again = with_chat_template(Processor(made, ProcessorConfig()), tmp_path)
    if name != "plain" and processor.config.chat != "own":
        assert (again.config.chat, again.config.system) == (processor.config.chat, processor.config.system)
    for turns in map(without_special, CHATS):
        own = TEMPLATES.get(processor.config.chat, processor.config.chat_format)
        if turns[0].role == "system" and own.system is None:
            continue
        if own.end is None and len(turns) > 2:
            continue  # this tokeniser has no token to end an answer with
        wanted = encode_conversation(turns, processor, prompt=True).tokens
        assert expected(theirs, turns) == wanted == encode_conversation(turns, again, prompt=True).tokens


REAL = Path(os.environ.get("MINIVLM_REAL", "real")) / "smollm2"


@pytest.mark.skipif(not REAL.is_dir(), reason="SmolLM2 is not here (MINIVLM_REAL)")
def test_smollm2_is_asked_as_it_was_taught():
    _, processor = load(REAL)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(REAL)
    assert processor.config.chat == "chatml" and "SmolLM" in processor.config.system
    for turns in map(without_special, CHATS):
        assert encode_conversation(turns, processor, prompt=True).tokens == expected(theirs, turns)
