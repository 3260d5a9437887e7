"""T5, its version 1.1 and Flan-T5 against transformers, in both directions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

import minivlm
from minivlm.empty_model import empty_model
from minivlm.layers import T5
from minivlm.pretrained import names, t5

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

V, END = 60, 1
FIRST = dict(vocab_size=V, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
FLAN = {**FIRST, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VARIANTS = {
    "t5": FIRST,
    "t5, wide heads, a shallow decoder": {**FIRST, "d_kv": 10, "num_decoder_layers": 1, "layer_norm_epsilon": 1e-3},
    "t5, near distances": {**FIRST, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6},
    "t5, another start": {**FIRST, "decoder_start_token_id": 9, "eos_token_id": [1, 7], "pad_token_id": 3},
    "flan-t5": FLAN,
    "flan-t5 of blip-2": {**FLAN, "dense_act_fn": "gelu"},
    "t5 v1.1, silu": {**FLAN, "feed_forward_proj": "gated-silu"},
    "ungated gelu": {**FLAN, "feed_forward_proj": "gelu"},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def reference(options):
    """A random model whose norms matter, and which is not indifferent to what comes next."""
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**options)).eval()
    if not options.get("tie_word_embeddings", True):
        model.lm_head.weight = torch.nn.Parameter(torch.randn(V, 24))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def compare(ours, theirs, close):
    """Encoder, logits and loss of a batch padded on the right, and greedy answers."""
    rows = [torch.randint(8, V, (n,)) for n in (150, 4, 1)]  # further apart than the last bucket begins
    tokens = pad_sequence(rows, batch_first=True)
    mask = torch.arange(150) < torch.tensor([[len(row)] for row in rows])
    labels = torch.randint(8, V, (3, 7))
    labels[1, 4:] = -100
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=mask.long(), labels=labels)
        output = ours(tokens, mask, labels)
        close(ours.encode(tokens, mask)[mask], expected.encoder_last_hidden_state[mask])
    close(output.logits, expected.logits)
    close(output.loss.reshape(1), expected.loss.reshape(1))
    said = ours.generate(tokens, mask, max_new_tokens=20).tolist()
    ends, pad = set(ours.config.end_tokens), ours.config.pad_token
    for row, answer in zip(rows, said, strict=True):
        alone = theirs.generate(input_ids=row[None], do_sample=False, max_new_tokens=20)[0, 1:].tolist()
        assert answer[: len(alone)] == alone
        assert set(answer[len(alone) :]) <= {pad} and (len(alone) == 20 or alone[-1] in ends)


@every_variant
def test_saved_by_transformers_loaded_by_us(options, tmp_path, close):
    theirs = reference(options)
    theirs.save_pretrained(tmp_path)
    compare(minivlm.load(tmp_path)[0], theirs, close)


@every_variant
def test_saved_by_us_loaded_by_transformers(options, tmp_path, close):
    reference(options).save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    theirs, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(ours, theirs.eval(), close)


def test_beams_as_transformers_searches_them(tmp_path):
    theirs = reference(FLAN)
    theirs.save_pretrained(tmp_path)
    ours, _ = minivlm.load(tmp_path)
    tokens = torch.randint(8, V, (4, 9))
    expected = theirs.generate(input_ids=tokens, num_beams=3, do_sample=False, max_new_tokens=8)[:, 1:]
    said = ours.generate(tokens, num_beams=3, max_new_tokens=8)
    assert torch.equal(said, expected[:, : said.shape[1]])


def test_a_config_of_transformers_4_says_it_with_the_tied_head(tmp_path, close):
    """Without scale_decoder_outputs and dense_act_fn, as all on the hub are."""
    for options in (FIRST, FLAN):
        theirs = reference(options)
        theirs.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        values = {**json.loads(path.read_text()), "tie_word_embeddings": options is FIRST, "n_positions": 512}
        for name in ("scale_decoder_outputs", "dense_act_fn", "is_gated_act"):
            values.pop(name, None)
        path.write_text(json.dumps(values))
        compare(minivlm.load(tmp_path)[0], theirs, close)


@pytest.mark.parametrize("kept", ["shared", "encoder.embed_tokens", "decoder.embed_tokens"])
def test_the_embedding_may_have_any_of_its_names(kept, tmp_path, close):
    theirs = reference(FIRST)
    theirs.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"{kept}.weight"] = stored.pop("shared.weight")
    stored["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(
        32, 4
    )  # as in t5-small
    save_file(stored, tmp_path / "model.safetensors")
    compare(minivlm.load(tmp_path)[0], theirs, close)


LARGE = dict(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32)
SIZES = {  # with the number of parameters that each is known for
    "t5-small": ({}, 60_506_624),
    "flan-t5-small": (dict(d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu", tie_word_embeddings=False), 76_961_152),
    "flan-t5-xl": ({**LARGE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, 2_849_757_184),
}  # fmt: skip


@pytest.mark.parametrize(("options", "parameters"), SIZES.values(), ids=SIZES)
def test_published_sizes_name_by_name(options, parameters):
    config = t5.read_config(options)
    with torch.device("meta"):
        theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**options))
    stored = {k: v for k, v in theirs.state_dict().items() if not k.endswith("embed_tokens.weight")}
    if config.tie_head:
        stored.pop("lm_head.weight")
    ours = empty_model(T5, config)
    state, rows = ours.state_dict(keep_vars=True), t5.rows(config)
    names.to_ours(stored, state, rows, "file")  # raises unless every name and shape agrees
    written = names.to_theirs({k[0]: state[k[0]] for k in names.tied(state)}, rows)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in stored.items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters


@pytest.mark.parametrize("scale", [1.0, 40_000.0])
def test_in_fp16_the_same_weights_stay_in_fp32_and_both_come_as_near(scale, tmp_path):
    theirs = reference(FIRST)
    with torch.no_grad():
        for block in theirs.encoder.block:
            block.layer[-1].DenseReluDense.wo.weight *= scale
    theirs.save_pretrained(tmp_path / "fp32")
    half = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "fp32", dtype=torch.float16).eval()
    half.save_pretrained(tmp_path / "fp16")  # of two precisions, and its config says float16
    ours, _ = minivlm.load(tmp_path / "fp16")
    kept = lambda model: sorted(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert kept(ours) == kept(half)
    tokens, labels = torch.randint(8, V, (3, 9)), torch.randint(8, V, (3, 7))
    with torch.no_grad():
        right, reached = (m(input_ids=tokens, labels=labels).logits.float() for m in (theirs, half))
        got = ours(tokens, labels=labels).logits.float()
    off = lambda logits: ((logits - right).abs().max() / right.abs().max()).item()
    assert off(got) < max(2 * off(reached), 0.02)


@pytest.mark.parametrize(
    "how",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "early_stopping": True},
        {"min_length": 6, "forced_bos_token_id": 11},
        {
            "decoder_start_token_id": 13,
            "suppress_tokens": [20, 21, 22, 23],
            "begin_suppress_tokens": list(range(24, 50)),
        },
        {"max_length": 7, "forced_eos_token_id": 1},
    ],
    ids=str,
)
def test_generation_config(how, tmp_path):
    """What the file says holds for both, the start token counting as said."""
    theirs = reference(VARIANTS["t5"])
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **how}))
    theirs, (ours, _) = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval(), minivlm.load(tmp_path)
    length = {} if "max_length" in how else {"max_new_tokens": 12}
    for n in (9, 3):
        tokens = torch.randint(8, V, (1, n))
        expected = theirs.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **length)[:, 1:]
        assert ours.generate(tokens, **length).tolist() == expected.tolist()
