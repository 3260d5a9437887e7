"""transformers' LLaMA, Mistral and Qwen2 layouts without transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm.checkpoint import load, save
from minivlm.errors import Note, UserError
from minivlm.layers import LanguageModel, LanguageModelConfig, RopeScaling
from minivlm.pretrained import comparable, llama
from minivlm.processor import Processor, ProcessorConfig
from minivlm.special_tokens import Markup
from tests.sentencepiece import llama_tokenizer

NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
CONFIG = LanguageModelConfig(
    width=16,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp_width=24,
    gated_mlp=True,
    activation="silu",
    norm="rmsnorm",
    rope_theta=10_000.0,
    positions="none",
    vocab_size=320,
    context=64,
    tie_head=False,
    end_tokens=(2,),
    pad_token=2,
    **NO_BIAS,
)
LLAMA3 = RopeScaling("llama3", 8.0, low_frequency=1.0, high_frequency=4.0, original_context=16)
QWEN2 = replace(CONFIG, qkv_bias=True, tie_head=True)


def logits(model):
    tokens = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (CONFIG, "llama"),
        (replace(CONFIG, kv_heads=None, tie_head=True, end_tokens=(2, 7), pad_token=0), "llama"),
        (replace(CONFIG, head_width=6, norm_eps=1e-6, rope_theta=500.0), "llama"),
        (replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0)), "llama"),
        (replace(CONFIG, rope_scaling=LLAMA3, **dict.fromkeys(NO_BIAS, True)), "llama"),
        (QWEN2, "qwen2"),
        (replace(QWEN2, end_tokens=()), "qwen2"),
    ],
)
def test_there_and_back(config, kind, tmp_path):
    model = LanguageModel(config).eval()
    save(tmp_path, model, layout="hf")
    back, _ = load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    assert comparable(back.config) == comparable(config)
    assert torch.equal(logits(back), logits(model))


def test_scaled_angles_are_not_the_plain_ones():
    """That the test above would see a lost rope_scaling."""
    plain, *scaled = (
        logits(LanguageModel(replace(CONFIG, rope_scaling=s)).eval())
        for s in (None, LLAMA3, RopeScaling("linear", 4.0))
    )
    assert all((plain - other).abs().max() > 1e-2 for other in scaled)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_with_and_without_model(prefix, tmp_path):
    model = LanguageModel(replace(QWEN2, depth=1)).eval()
    save(tmp_path, model, layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.0"
    assert set(stored) == {
        *("model.embed_tokens.weight", "model.norm.weight"),
        *(f"{layer}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")),
        *(f"{layer}.self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"{layer}.self_attn.{n}_proj.bias" for n in "qkv"),
        *(f"{layer}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }
    extra = {f"{prefix}layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    renamed = {prefix + k.removeprefix("model."): v for k, v in stored.items()}
    save_file({**renamed, **extra}, tmp_path / "model.safetensors")
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))


def test_a_missing_head_is_named(tmp_path):
    """Where the config says that the head is no embedding, there must be one."""
    save(tmp_path, LanguageModel(CONFIG), layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    head = stored.pop("lm_head.weight")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(lm_head\.weight\)"):
        load(tmp_path)
    stored.pop("model.embed_tokens.weight")
    save_file({**stored, "lm_head.weight": head}, tmp_path / "model.safetensors")
    rewrite(tmp_path, tie_word_embeddings=True)
    assert torch.equal(load(tmp_path)[0].token_embedding.weight, head)  # a tied tensor, kept under the other name


def rewrite(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_shards_in_bfloat16(tmp_path):
    model = LanguageModel(CONFIG).to(torch.bfloat16).eval()
    save(tmp_path, model, layout="hf")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    where = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(stored)}
    for shard in set(where.values()):
        save_file({name: t for name, t in stored.items() if where[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    back, _ = load(tmp_path)
    assert back.dtype == torch.bfloat16 and torch.equal(logits(back), logits(model))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"final_norm": False}, "LlamaForCausalLM cannot express final_norm = False"),
        ({"qkv_bias": True, "mlp_bias": True}, "Qwen2ForCausalLM cannot express mlp_bias = True"),
        ({"gated_mlp": False}, "LlamaForCausalLM cannot express gated_mlp = False"),
        ({"positions": "learned"}, "LlamaForCausalLM cannot express positions = 'learned'"),
        ({"causal": False}, "LlamaForCausalLM cannot express causal = False"),
    ],
)
def test_what_transformers_cannot_express_is_named(changes, named, tmp_path):
    with pytest.raises(UserError, match=named):
        save(tmp_path, LanguageModel(replace(CONFIG, **changes)), layout="hf")


# ---- config ----------------------------------------------------------------------------------------------------------


def read(kind="llama", **values):
    return llama.read_config({"model_type": kind, **values})


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (
            "llama",
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "of the type 'dynamic'; there are default, linear",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "of the type 'yarn'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "no model that can be built: 'factor'"),
        ("llama", {"hidden_act": "tanh"}, "activation 'tanh'"),
        ("llama", {"num_key_value_heads": 5}, "no model that can be built"),
    ],
)
def test_configs_that_cannot_be_followed(kind, values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **values}))
    with pytest.raises(UserError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("mistral", {"max_position_embeddings": 32768, "sliding_window": 4096}),  # Mistral-7B-v0.1
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 32}),
    ],
)
def test_of_a_sliding_window_texts_within_it_are_read(kind, values):
    with pytest.warns(Note, match="up to 4096 tokens, not"):
        assert read(kind, **values).context == 4096


def test_windows_without_effect_are_none():
    for kind, values in (
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 131072}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 32}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 32}),
        ("llama", {"sliding_window": 4}),
    ):
        assert read(kind, **values).context == {"mistral": 131072, "qwen2": 32768, "llama": 2048}[kind]


def test_defaults():
    c = read()
    assert (c.width, c.depth, c.heads, c.kv_heads, c.hidden_width) == (4096, 32, 32, None, 11008)
    assert (c.vocab_size, c.context, c.norm_eps, c.rope_theta, c.tie_head) == (32000, 2048, 1e-6, 1e4, False)
    assert (c.end_tokens, c.qkv_bias, c.out_bias, c.mlp_bias) == ((2,), False, False, False)
    c = read("qwen2")
    assert (c.vocab_size, c.hidden_width, c.kv_heads, c.context) == (151936, 22016, 32, 32768)
    assert (c.end_tokens, c.pad_token, c.qkv_bias, c.out_bias) == ((), 0, True, False)
    assert (read("mistral", sliding_window=None).kv_heads, read("qwen2", attention_bias=False).qkv_bias) == (8, True)


LINEAR = {"factor": 2.0}
THREE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("values", "theta", "scaling"),
    [
        ({"rope_theta": 100000}, 1e5, None),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, 1e4, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, 1e6, None),
        ({"rope_theta": 1e5, "rope_scaling": {"type": "linear", **LINEAR}}, 1e5, RopeScaling("linear", 2.0)),
        ({"rope_parameters": {"rope_type": "linear", **LINEAR, "rope_theta": 1e5}}, 1e5, RopeScaling("linear", 2.0)),
        (
            {"rope_scaling": {"rope_type": "llama3", **THREE, "original_max_position_embeddings": 16}},
            1e4,
            RopeScaling("llama3", 8.0, original_context=16),
        ),
        ({"rope_scaling": {"rope_type": "llama3", **THREE}}, 1e4, RopeScaling("llama3", 8.0, original_context=2048)),
    ],
)
def test_spellings_of_rope(values, theta, scaling):
    config = read(**values)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("generation", "config", "ends", "pad"),
    [
        (None, {}, (2,), 2),
        (None, {"eos_token_id": [5, 6], "pad_token_id": -1}, (5, 6), 5),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 5, "pad_token_id": 0}, (7, 8), 0),
        ({"eos_token_id": None, "pad_token_id": 9}, {"eos_token_id": 5}, (5,), 9),
        (None, {"eos_token_id": None}, (), 0),
    ],
)
def test_the_tokens_that_end_and_fill_an_answer(generation, config, ends, pad, tmp_path):
    save(tmp_path, LanguageModel(CONFIG), layout="hf")
    values = json.loads((tmp_path / "config.json").read_text())
    values = {k: v for k, v in values.items() if k not in ("eos_token_id", "pad_token_id")}
    (tmp_path / "config.json").write_text(json.dumps({**values, **config}))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    config = load(tmp_path)[0].config
    assert (config.end_tokens, config.pad_token) == (ends, pad)


# ---- tokeniser -------------------------------------------------------------------------------------------------------


def test_tokeniser_there_and_back(tmp_path):
    tokenizer = llama_tokenizer()
    processor = Processor(tokenizer, ProcessorConfig(context=64, pad_token=2))
    save(tmp_path, LanguageModel(CONFIG), processor, layout="hf")
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (about["bos_token"], about["eos_token"], about["pad_token"]) == ("<s>", "</s>", "</s>")
    _, back = load(tmp_path)
    tokens, mask = back.text(["the cat", "a"])
    assert tokens[0].tolist() == [1, *map(tokenizer.token_to_id, ["▁the", "▁cat"])] and tokens[1, 2] == 2
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    texts = ["the cat", "  two  spaces ", "zürich 你好 😀", "", "a\nb"]
    assert back.decode(back.text(texts)[0]) == texts
    assert back.decode([back.ids("the cat")[1:]]) == ["cat"]  # what follows a prompt begins without a space


def test_an_added_token_beyond_the_embedding_is_refused_where_it_is_used(tmp_path):
    tokenizer = llama_tokenizer("<extra>")
    processor, size = Processor(tokenizer, ProcessorConfig(pad_token=2)), tokenizer.get_vocab_size()
    save(tmp_path, LanguageModel(replace(CONFIG, vocab_size=size - 1)), processor, layout="hf")
    model, words = load(tmp_path)
    model(*words.text(["the cat"]))
    with pytest.raises(UserError, match=rf"has token {size - 1}, but the model knows tokens 0 to {size - 2}: "):
        model(*words.text([["the ", Markup("<extra>"), " cat"]]))
    with pytest.raises(UserError, match=r"has token -1, but"):
        model(torch.tensor([[1, -1]]))


def test_a_word_beyond_the_embedding_is_another_models(tmp_path):
    tokenizer = llama_tokenizer()
    save(tmp_path, LanguageModel(CONFIG), Processor(tokenizer, ProcessorConfig(pad_token=2)), layout="hf")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 300}))
    with pytest.raises(UserError, match=r"but vocab_size in config\.json is 300"):
        load(tmp_path)
