"""Model files that are broken, or meant to do harm: one sentence and soon, or the model; never anything else."""

import copy
import json
import os
import random
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import minivlm
from minivlm.errors import UserError
from minivlm.layers import BERT, T5, BERTConfig, LanguageModel, LanguageModelConfig, T5Config, VisionConfig
from minivlm.models.clip import CLIP
from minivlm.processor import Processor
from tests import speakers
from tests.pretrained import test_align, test_hf_clip

LM = LanguageModelConfig(width=16, depth=2, heads=2, vocab_size=300, context=12, end_tokens=(3,), pad_token=3)
LLAMA = replace(LM, positions="none", rope_theta=1e4, norm="rmsnorm", gated_mlp=True, activation="silu", tie_head=False)
LLAMA = replace(LLAMA, qkv_bias=False, out_bias=False, mlp_bias=False)
SEES = VisionConfig(width=16, depth=2, heads=2, image_size=16, patch_size=8, activation="quick_gelu")
FAMILIES = {
    "clip": lambda: CLIP(test_hf_clip.CONFIG),
    "align": lambda: CLIP(test_align.CONFIG),
    "gpt2": lambda: LanguageModel(LM),
    "llama": lambda: LanguageModel(LLAMA),
    "llava": lambda: speakers.llava(vision=SEES, language=replace(LLAMA, vocab_size=400)),
    "t5": lambda: T5(T5Config(vocab_size=300, width=16, depth=1, heads=2, end_tokens=(1,))),
    "bert": lambda: BERT(BERTConfig(vocab_size=300, width=16, depth=1, heads=2)),
}
WORSE = [None, 0, -1, 1, 10**7, 10**12, 10**30, 1.5, 1e308, "", "x", [], {}, [1], [None], {"a": 1}, True, ...]
SLOWEST = 2.0  # seconds


def places(values, path=()):
    for key, value in values.items() if isinstance(values, dict) else enumerate(values[:3]):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def changed(values, path, value):
    """A copy with another value at a place; ...: without it."""
    values = copy.deepcopy(values)
    *above, last = path
    inner = values
    for key in above:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return values


def sentence_or_model(directory):
    began = time.perf_counter()
    try:
        minivlm.load(directory)
    except UserError as error:
        assert "\n" not in str(error), error
    assert time.perf_counter() - began < SLOWEST


@pytest.mark.parametrize("layout", ["hf", "minivlm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_with_a_value_that_cannot_be(family, layout, tmp_path):
    processor = Processor.train(["a red disc"], vocab_size=300, image_size=16, context=8)
    with_words = processor if layout == "minivlm" and family == "clip" else None
    FAMILIES[family]().save_pretrained(tmp_path, layout=layout, processor=with_words)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rng = random.Random(f"{family} {layout}")
    cases = [(place, worse) for place in places(values) for worse in WORSE]
    for place, worse in rng.sample(cases, min(len(cases), 60)):
        path.write_text(json.dumps(changed(values, place, worse)))
        sentence_or_model(tmp_path)


def test_bytes_that_are_others(tmp_path):
    LanguageModel(LM).save_pretrained(tmp_path)
    rng = random.Random(7)
    for name in ("model.safetensors", "config.json"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            broken = bytearray(whole)
            for _ in range(rng.choice([1, 3, 20])):
                broken[rng.randrange(min(len(broken), 2500))] = rng.randrange(256)
            (tmp_path / name).write_bytes(bytes(broken[: rng.choice([len(broken), rng.randrange(len(broken))])]))
            sentence_or_model(tmp_path)
        (tmp_path / name).write_bytes(whole)


@pytest.fixture
def saved(tmp_path):
    LanguageModel(LM).save_pretrained(tmp_path, layout="hf")
    return tmp_path


TEXTS = {
    "nested too deeply": b'{"model_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"model_type": "gpt2", "n_embd": ' + b"9" * 10_000 + b"}",
    "NaN is no number": b'{"model_type": "gpt2", "layer_norm_epsilon": NaN}',
    "-Infinity is no number": b'{"model_type": "gpt2", "layer_norm_epsilon": -Infinity}',
    "1e999 is no number": b'{"model_type": "gpt2", "layer_norm_epsilon": 1e999}',
    "'n_embd' is there twice, with different values": b'{"model_type": "gpt2", "n_embd": 8, "n_embd": 16}',
    "it is not UTF-8 text": b'{"model_type": "gpt2", "x": "\xff\xfe"}',
    "half a": b'{"model_type": "gpt2", "x": "\\ud83d"}',
    "holds a list": b"[1]",
    "is not JSON": b"",
    "which are no names": b'{"model_type": ["gpt2"], "architectures": 3}',
    "architectures": b'{"model_type": "gpt2", "architectures": "GPT2LMHeadModel"}',
}


@pytest.mark.parametrize("said", TEXTS)
def test_json_that_is_none(said, saved):
    (saved / "config.json").write_bytes(TEXTS[said])
    with pytest.raises(UserError, match=said) as error:
        minivlm.load(saved)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_byte_order_mark_is_passed_over_and_the_same_twice_is_once(saved):
    text = (saved / "config.json").read_text()
    twice = text.rstrip().removesuffix("}") + ', "model_type": "gpt2"}'
    (saved / "config.json").write_bytes(b"\xef\xbb\xbf" + twice.encode())
    minivlm.load(saved)


def test_layers_are_counted_before_they_are_built(saved):
    values = json.loads((saved / "config.json").read_text())
    for depth, said in ((9_000, "asks for 9000 layers, but the file has"), (10**7, "no file has so many")):
        (saved / "config.json").write_text(json.dumps(values | {"n_layer": depth}))
        began = time.perf_counter()
        with pytest.raises(UserError, match=said):
            minivlm.load(saved)
        assert time.perf_counter() - began < SLOWEST


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda: LanguageModel(LM), "pad_token", 300),
        (lambda: LanguageModel(LM), "end_tokens", [3, 300]),
        (lambda: CLIP(test_hf_clip.CONFIG), "text.end_token", 10**6),
        (lambda: T5(T5Config(vocab_size=300, width=16, depth=1, heads=2)), "start_token", -5),
        (speakers.llava, "image_token", 400),
    ],
)
def test_a_token_that_the_model_has_no_row_for(make, name, value, tmp_path):
    make().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(changed(values, ("config", *name.split(".")), value)))
    with pytest.raises(UserError, match=f"{name.split('.')[-1]} is .*, but the model knows tokens 0 to"):
        minivlm.load(tmp_path)


# ---- files of weights ------------------------------------------------------------------------------------------------


def shards(directory, **files):
    """Each name → its file; the files hold what they are said to hold."""
    (directory / "model.safetensors").rename(directory / "all")
    tensors = load_file(directory / "all")
    save_file({n: t.clone() for n, t in tensors.items()}, directory / "model-1.safetensors")
    index = dict.fromkeys(tensors, "model-1.safetensors") | files
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "", "config.json", "a/../../b.safetensors"]
)
def test_an_index_reads_no_file_elsewhere(name, saved):
    shards(saved, more=name)
    with pytest.raises(UserError, match="which is no file of weights beside it"):
        minivlm.load(saved)


def test_an_index_that_names_no_files(saved):
    shards(saved)
    for index in ({"a": 3}, {"a": None}, [], None, 5):
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        with pytest.raises(UserError, match="weight_map"):
            minivlm.load(saved)


def test_of_a_tensor_in_two_files_the_one_that_the_index_names(saved):
    tensors = shards(saved)
    name = next(n for n in tensors if n.endswith("ln_f.weight"))
    save_file({name: torch.full_like(tensors[name], 7.0)}, saved / "model-0.safetensors")
    path = saved / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    for file, value in (("model-0.safetensors", 7.0), ("model-1.safetensors", 1.0)):
        path.write_text(json.dumps({"weight_map": index | {name: file, "model.none": "model-0.safetensors"}}))
        assert minivlm.load(saved)[0].norm.weight[0] == value


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "model-1.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    ],
)
def test_pipes_and_folders_are_not_waited_for(name, saved):
    if name == "model-1.safetensors":
        shards(saved)
    if name == "chat_template.jinja":
        bytes_alone = Processor.train(["a"], vocab_size=260, image_size=16, context=8)
        (saved / "tokenizer.json").write_text(bytes_alone.tokenizer.to_str())
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    with pytest.raises(UserError, match="named pipe"):
        minivlm.load(saved)
    (saved / name).unlink()
    (saved / name).mkdir()
    with pytest.raises(UserError, match="is a folder"):
        minivlm.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, saved):
    tensors = load_file(saved / "model.safetensors")
    save_file({n: torch.full_like(t, value) for n, t in tensors.items()}, saved / "model.safetensors")
    with pytest.raises(UserError, match=r"NaN or infinity in \d+ tensors \(.* more\)"):
        minivlm.load(saved)


def test_answers_that_are_no_numbers_are_refused():
    """As of weights with a hole where loading does not look."""
    processor = Processor.train(["a red disc"], vocab_size=300, image_size=16, context=8)
    model = CLIP(test_hf_clip.CONFIG).eval()
    with torch.no_grad():
        model.vision.norm.weight[5] = torch.nan
        model.text.norm.weight[5] = torch.nan
    picture = speakers.plain("red")
    with pytest.raises(UserError, match="the output of this CLIP is NaN or infinite"):
        minivlm.zero_shot_classify([picture], ["red", "blue"], model, processor)
    speaker, words = speakers.llava(), speakers.processor()
    with torch.no_grad():
        speaker.language_model.norm.weight[5] = torch.nan
    with pytest.raises(UserError, match="the logits of the model are NaN"):
        minivlm.caption(picture, speaker, words)
