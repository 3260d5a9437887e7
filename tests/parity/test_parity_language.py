"""GPT-2, GPT-NeoX, OPT, LLaMA, Mistral and Qwen2 against transformers, in both directions."""

import copy
import json

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import minivlm
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.layers import LanguageModel
from minivlm.pretrained import comparable, gpt2, gpt_neox, llama, names, opt

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

V, END = 60, 7
ENDS = list(range(40, 56))

GPT2 = dict(vocab_size=V, n_positions=40, n_embd=24, n_layer=2, n_head=3, bos_token_id=END, eos_token_id=END)
OPT = dict(
    vocab_size=V,
    max_position_embeddings=40,
    hidden_size=24,
    ffn_dim=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    word_embed_proj_dim=24,
)
LLAMA = dict(
    vocab_size=V,
    max_position_embeddings=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
)
NEOX = {**LLAMA, "num_attention_heads": 2}  # of 12 channels, of which a quarter is no pairs
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500.0,
}
VARIANTS = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, another MLP": ("GPT2", {**GPT2, "n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    "gpt2, exact gelu": ("GPT2", {**GPT2, "activation_function": "gelu"}),
    "gpt2, its own head": ("GPT2", {**GPT2, "tie_word_embeddings": False}),
    "opt": ("OPT", OPT),
    "opt-350m": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "opt, no final norm": ("OPT", {**OPT, "_remove_final_layer_norm": True, "activation_function": "gelu"}),
    "opt, no biases": ("OPT", {**OPT, "enable_bias": False, "tie_word_embeddings": False, "eos_token_id": [2, END]}),
    "llama": ("Llama", LLAMA),
    "TinyLlama": ("Llama", {**LLAMA, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "SmolLM2": ("Llama", {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {**LLAMA, "head_dim": 10, "hidden_act": "gelu_new"}),
    "llama, biases": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama, linear": ("Llama", {**LLAMA, "rope_parameters": LINEAR}),
    "llama 3": ("Llama", {**LLAMA, "rope_parameters": LLAMA3, "attention_bias": True}),
    "mistral": ("Mistral", {**LLAMA, "num_key_value_heads": 2, "sliding_window": None}),
    "mistral, a window beyond the context": ("Mistral", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 64}),
    "mistral, texts within its window": ("Mistral", {**LLAMA, "num_key_value_heads": 2, "sliding_window": 30}),
    "qwen2": ("Qwen2", {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True, "eos_token_id": ENDS}),
    "qwen2, theta": ("Qwen2", {**LLAMA, "num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "pythia": ("GPTNeoX", {**NEOX, "rotary_pct": 0.5}),
    "RedPajama-INCITE": ("GPTNeoX", {**NEOX, "rotary_pct": 1.0, "use_parallel_residual": False}),
    "gpt_neox, all changed": ("GPTNeoX", {**NEOX, "rotary_pct": 0.34, "attention_bias": False, "hidden_act": "gelu_new", "tie_word_embeddings": True, "rotary_emb_base": 300, "layer_norm_eps": 1e-3}),
    "gpt_neox, linear": ("GPTNeoX", {**NEOX, "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}),
}  # fmt: skip


def reference(kind, options):
    """A random model whose norms and biases matter, and which is not indifferent to what comes next."""
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def prompts():
    """Rows of 9, 4 and 1 tokens."""
    return [torch.randint(8, V, (n,)) for n in (9, 4, 1)]


def compare(ours, theirs, close):
    """Logits of a batch padded on the right, and on the left, and the tokens that follow greedily."""
    rows = prompts()
    tokens = pad_sequence(rows, batch_first=True, padding_value=1)
    mask = torch.arange(9) < torch.tensor([[len(row)] for row in rows])
    with torch.no_grad():
        alone = [theirs(row[None]).logits[0] for row in rows]
        for flip in (lambda t: t, lambda t: torch.stack([r.roll(9 - len(a)) for r, a in zip(t, rows, strict=True)])):
            logits = ours(flip(tokens), flip(mask)).logits[flip(mask)]
            close(logits, torch.cat(alone))
        labels = tokens.masked_fill(~mask, -100)
        close(
            ours(tokens[:1], labels=labels[:1]).loss.reshape(1),
            theirs(tokens[:1], labels=labels[:1]).loss.reshape(1),
        )
    said = ours.generate(tokens, mask, max_new_tokens=20).tolist()
    for row, answer in zip(rows, said, strict=True):
        expected = theirs.generate(
            row[None], attention_mask=torch.ones_like(row[None]), do_sample=False, max_new_tokens=20
        )
        expected = expected[0, len(row) :].tolist()
        assert answer[: len(expected)] == expected
        assert set(answer[len(expected) :]) <= {ours.config.pad_token}


@pytest.mark.parametrize(("kind", "options"), VARIANTS.values(), ids=VARIANTS)
def test_saved_by_transformers_loaded_by_us(kind, options, tmp_path, close):
    theirs = reference(kind, options)
    theirs.save_pretrained(tmp_path)
    ours, _ = minivlm.load(tmp_path)
    compare(ours, theirs, close)


@pytest.mark.parametrize(("kind", "options"), VARIANTS.values(), ids=VARIANTS)
def test_saved_by_us_loaded_by_transformers(kind, options, tmp_path, close):
    reference(kind, options).save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(theirs).__name__.startswith("Llama" if kind == "Mistral" else kind)  # without a window they are one
    compare(ours, theirs.eval(), close)


def test_the_answers_compared_end_at_different_lengths(tmp_path):
    theirs = reference(*VARIANTS["qwen2"])
    theirs.save_pretrained(tmp_path)
    tokens = torch.arange(8, V)[:, None]
    said = minivlm.load(tmp_path)[0].generate(tokens, max_new_tokens=20)
    assert len(set(torch.isin(said, torch.tensor(ENDS)).long().argmax(dim=1).tolist())) > 3


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["default", "linear", "llama3"])
def test_both_spellings_of_rope(scaling):
    """rope_theta and rope_scaling of transformers 4 mean what rope_parameters of transformers 5 mean."""
    scaling = scaling or {"rope_type": "default", "rope_theta": 500.0}
    values = {"model_type": "llama", **LLAMA}
    new = llama.read_config({**values, "rope_parameters": scaling})
    kind = scaling["rope_type"]
    rest = {k: v for k, v in scaling.items() if k not in ("rope_theta", "rope_type")}
    for old in ({"type": kind, **rest}, {"rope_type": kind, **rest}):
        old = {**values, "rope_theta": 500.0, "rope_scaling": old if rest else None}
        theirs = transformers.LlamaConfig.from_dict(copy.deepcopy(old)).to_dict()
        assert comparable(llama.read_config(old)) == comparable(new) == comparable(llama.read_config(theirs))


def test_the_special_tokens_of_an_answer(tmp_path):
    """generation_config.json goes before config.json, as in transformers."""
    theirs = reference("Llama", {**LLAMA, "eos_token_id": 3, "pad_token_id": None})
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = minivlm.load(tmp_path)[0].config
    assert (config.end_tokens, config.pad_token) == ((3,), 3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, END], "pad_token_id": 9}))
    config = minivlm.load(tmp_path)[0].config
    assert (config.end_tokens, config.pad_token) == ((5, END), 9)
    compare(
        minivlm.load(tmp_path)[0], transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), lambda *_: None
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_shards(dtype, tmp_path, close):
    theirs = reference("Qwen2", VARIANTS["qwen2"][1]).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours, _ = minivlm.load(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    compare(minivlm.load(tmp_path, dtype=torch.float32)[0], exact, close)
    tokens = torch.randint(V, (2, 12))
    with torch.no_grad():
        ours, theirs, exact = ours(tokens).logits, theirs(tokens).logits, exact(tokens).logits
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()  # as close to the truth as theirs


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_a_head_in_the_file_goes_before_a_config_that_ties_it(kind, tmp_path, close):
    options = {**(GPT2 if kind == "GPT2" else LLAMA), "tie_word_embeddings": False}
    theirs = reference(kind, options)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    ours, _ = minivlm.load(tmp_path)
    assert not ours.config.tie_head
    compare(ours, theirs, close)


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "Llama"])
def test_files_of_the_model_without_its_head(kind, tmp_path, close):
    """GPT2Model, OPTModel and LlamaModel write the names without their first part, as the gpt2 on the hub has them."""
    options = {"GPT2": GPT2, "OPT": OPT, "Llama": {**LLAMA, "tie_word_embeddings": True}}[kind]
    theirs = reference(kind, options)
    theirs.base_model.save_pretrained(tmp_path)
    compare(minivlm.load(tmp_path)[0], theirs, close)


BIG = {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
TINY = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4}
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
PYTHIA = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 50304,
}
SIZES = {  # with the number of parameters that each is known for
    "gpt2": (gpt2, "GPT2", {}, 124_439_808),
    "opt-125m": (opt, "OPT", {}, 125_239_296),
    "opt-2.7b": (opt, "OPT", BIG, 2_651_596_800),
    "TinyLlama-1.1B": (llama, "Llama", TINY, 1_100_048_384),
    "pythia-70m": (gpt_neox, "GPTNeoX", PYTHIA, 70_426_624),
    "Qwen2-0.5B": (llama, "Qwen2", {**QWEN, "num_key_value_heads": 2, "tie_word_embeddings": True}, 494_032_768),
}


@pytest.mark.parametrize(("module", "kind", "options", "parameters"), SIZES.values(), ids=SIZES)
def test_published_sizes_name_by_name(module, kind, options, parameters):
    config = getattr(transformers, f"{kind}Config")(**options)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    ours = empty_model(LanguageModel, module.read_config(config.to_dict()))
    rows = module.rows(ours.config) if callable(module.rows) else module.rows
    stored = {k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight" or not config.tie_word_embeddings}
    if module is gpt_neox:  # as files call it, and as transformers 5 does in memory
        stored["embed_out.weight"] = stored.pop("lm_head.weight")
    state = ours.state_dict(keep_vars=True)
    names.to_ours(stored, state, rows, kind)  # raises unless every name and shape agrees
    written = names.to_theirs({k[0]: state[k[0]] for k in names.tied(state)}, rows)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in stored.items()}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == parameters


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ],
)
def test_what_cannot_be_followed_is_refused(kind, options, tmp_path):
    reference(kind, {**LLAMA, "num_key_value_heads": 2, **options}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of the type 'dynamic'"):
        minivlm.load(tmp_path)


@pytest.mark.parametrize(("kind", "special"), [("GPT2", ["<|endoftext|>"]), ("OPT", ["</s>", "<pad>"])])
def test_tokenisers_of_vocabulary_and_merges(kind, special, tmp_path):
    """Without tokenizer.json, as OPT is on the hub: the ids of transformers' tokeniser, and the text back."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "c"), ("Ġc", "a"), ("o", "f"), ("Ġ", "of")]
    symbols = [*letters, *(a + b for a, b in merges)]
    vocab = {
        s: i
        for i, s in enumerate([*symbols, *special] if kind == "GPT2" else ["<s>", "<pad>", "</s>", "<unk>", *symbols])
    }
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    options = {**(GPT2 if kind == "GPT2" else OPT), "vocab_size": len(vocab)}
    reference(kind, options).save_pretrained(tmp_path)
    _, ours = minivlm.load(tmp_path)
    start = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>") if kind == "OPT" else {}
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=merges, **start)
    first = [vocab["</s>"]] if kind == "OPT" else []
    for text in ["the cat", " the  cat\n", "zürich 你好 😀", "it's 12 of", "the cat <s>", ""]:
        ids = first + theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.text([text])[0][0].tolist() == ids
        assert ours.decode([ids]) == [theirs.decode(ids, skip_special_tokens=True)]
