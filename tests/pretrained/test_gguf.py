"""GGUF files of the LLaMA family, and those that are refused."""

import sys

import pytest
import torch

import minivlm
from minivlm.errors import UserError
from minivlm.info import info
from minivlm.layers import RopeScaling
from minivlm.processor import Processor, ProcessorConfig
from tests.gguf_files import (
    byte_pair_words,
    metadata_of,
    sentencepiece_words,
    their_tensors,
    tiny_model,
    write_gguf,
)
from tests.sentencepiece import llama_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BYTES = byte_pair_words()
TEXTS = ["the cat", " a  cat\nUSER: é 12", "at"]


def write(path, model=None, words=BYTES, kind="llama", tensors=None, **more):
    model = model or tiny_model(len(words["tokens"]))
    write_gguf(path, metadata_of(model, words, kind, **more), tensors or their_tensors(model, kind))
    return model


def same_logits(ours, model, close=1e-5):
    tokens = torch.randint(250, (2, 12))
    with torch.no_grad():
        assert (ours(tokens).logits.float() - model(tokens).logits.float()).abs().max() < close


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_head": False}),
        ("llama", {"qkv_bias": True, "out_bias": True}),
        ("llama", {"rope_scaling": RopeScaling("linear", 2.0)}),
        ("llama", {"rope_scaling": RopeScaling("llama3", 8.0), "rope_theta": 500_000.0}),
        ("qwen2", {"qkv_bias": True}),
    ],
)
def test_a_file_computes_what_the_model_it_was_made_of_does(kind, options, tmp_path):
    model, more = tiny_model(len(BYTES["tokens"]), **options), {}
    tensors = their_tensors(model, kind)
    if (scaling := options.get("rope_scaling")) is not None and scaling.kind == "linear":
        more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    elif scaling is not None:
        frequency = model.config.rope_theta ** (-torch.arange(0, 8, 2) / 8)
        tensors["rope_freqs.weight"] = frequency / scaling(frequency)
    write(tmp_path / "model.gguf", model, kind=kind, tensors=tensors, **more)
    for source in (tmp_path / "model.gguf", tmp_path):  # the file, or the directory that holds it alone
        ours, _ = minivlm.load(source)
        assert ours.config == model.config
        same_logits(ours, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floating_point_numbers_stay_in_the_precision_of_the_file(dtype, tmp_path):
    model = tiny_model(len(BYTES["tokens"]))
    tensors = {n: t if "norm" in n else t.to(dtype) for n, t in their_tensors(model).items()}
    write(tmp_path / "model.gguf", model, tensors=tensors)
    ours, _ = minivlm.load(tmp_path)
    assert ours.dtype == dtype
    expected = model.state_dict()
    assert all(torch.equal(t, expected[n].to(dtype)) for n, t in ours.state_dict().items())


def test_tokens_of_sentencepiece_follow_from_the_scores(tmp_path):
    words = sentencepiece_words()
    write(tmp_path / "model.gguf", words=words)
    _, ours = minivlm.load(tmp_path)
    theirs = Processor(llama_tokenizer(), ProcessorConfig())
    assert ours.encode(TEXTS) == theirs.encode(TEXTS)
    assert ours.decode(ours.encode(TEXTS)) == theirs.decode(theirs.encode(TEXTS)) == TEXTS
    for added, expected in (({"add_space_prefix": False}, ["<s>", "a", "t"]), ({"add_eos_token": True}, None)):
        write(tmp_path / "model.gguf", words=words | added)
        processor = minivlm.load(tmp_path)[1]
        found = [processor.tokenizer.id_to_token(id) for id in processor.encode(["at"])[0]]
        assert found == (expected or ["<s>", "▁a", "t", "</s>"])


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "3", "Ġa", "cat"]),
        ("gpt-2", ["12", "3", "Ġa", "cat"]),
        ("qwen2", ["1", "2", "3", "Ġa", "cat"]),
        ("llama-bpe", ["<|im_start|>", "12", "3", "Ġa", "cat"]),
    ],
)
def test_texts_are_cut_as_the_file_says(pre, expected, tmp_path):
    words = byte_pair_words(pre)
    if pre == "llama-bpe":
        del words["add_bos_token"]  # it puts one in front unless it is told otherwise
    write(tmp_path / "model.gguf", words=words)
    processor = minivlm.load(tmp_path)[1]
    found = [processor.tokenizer.id_to_token(id) for id in processor.ids("123 acat", frame=True)]
    assert found == [*expected[:-1], *(["cat"] if "Ġa" not in expected else [expected[-1]])]
    assert processor.decode(processor.encode(["12 cats <think>"])) == ["12 cats <think>"]


def test_the_chat_template_of_the_metadata_is_followed(tmp_path):
    write(tmp_path / "model.gguf", **{"tokenizer.chat_template": CHATML})
    model, processor = minivlm.load(tmp_path)
    assert processor.config.chat == "chatml" and model.config.end_tokens == (2,)
    told = info(tmp_path / "model.gguf")
    assert "LanguageModel, published, gguf" in told and "float32" in told and "answer, chat, complete" in told


def test_what_was_loaded_is_saved_in_any_layout(tmp_path):
    model = write(tmp_path / "model.gguf", **{"tokenizer.chat_template": CHATML})
    ours, processor = minivlm.load(tmp_path / "model.gguf")
    for layout in ("minivlm", "hf"):
        ours.save_pretrained(tmp_path / layout, processor=processor, layout=layout)
        again, same = minivlm.load(tmp_path / layout)
        same_logits(again, model)
        assert same.encode(TEXTS) == processor.encode(TEXTS) and same.config.chat == "chatml"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"general.architecture": "gemma2"}, r"architecture 'gemma2'; of GGUF files llama and qwen2 are supported\.$"),
        ({"llama.rope.scaling.type": "yarn"}, r"rope\.scaling\.type = 'yarn', which is not supported"),
        ({"llama.expert_count": 8}, r"has expert_count = 8, which is not known here"),
        ({"split.count": 3}, r"join them with llama\.cpp's gguf-split --merge\.$"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, r"tokenizer\.ggml\.pre = 'deepseek-llm' says, which is not supported"),
        ({"tokenizer.ggml.model": "bert"}, r"a tokeniser of the kind 'bert'"),
        ({"llama.rope.dimension_count": 4}, r"partial_rotary_factor"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(more, message, tmp_path):
    write(tmp_path / "model.gguf", **more)
    with pytest.raises(UserError, match=message):
        minivlm.load(tmp_path / "model.gguf")


def test_broken_files_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    whole = path.read_bytes()
    for data, message in (
        (whole[:100], r"is cut off or broken: its header cannot be read"),
        (whole[:-4000], r"is cut off within \S+: copy or download it again\.$"),
        (b"GGUF\x01\0\0\0" + whole[8:], r"version 1, supported are 2 and 3"),
        (b"PK\x03\x04" + whole[4:], r"is no GGUF file: it does not begin with GGUF\.$"),
        (whole[:16] + b"\xff" * 8 + whole[24:], r"is cut off or broken"),
        (b"", r"is no GGUF file"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            minivlm.load(path)


def test_of_several_files_one_is_to_be_named(tmp_path):
    write(tmp_path / "a.Q8_0.gguf")
    write(tmp_path / "b.F16.gguf")
    with pytest.raises(
        UserError, match=r"holds 2 GGUF files \(a\.Q8_0\.gguf, b\.F16\.gguf\): name the one that is meant"
    ):
        minivlm.load(tmp_path)
    assert minivlm.load(tmp_path / "a.Q8_0.gguf")


def test_a_quantised_file_asks_for_the_gguf_package(tmp_path, monkeypatch):
    model = tiny_model(len(BYTES["tokens"]))
    quantised = {"blk.0.ffn_up.weight": ((64, 32), 8, bytes(34 * 64))}
    write(tmp_path / "model.gguf", model, tensors=their_tensors(model) | quantised)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"is quantised, and the gguf package dequantises it: pip install gguf\.$"):
        minivlm.load(tmp_path / "model.gguf")
