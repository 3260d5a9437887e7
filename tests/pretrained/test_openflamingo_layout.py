"""OpenFlamingo's three parts in a directory, as its authors' code writes and reads them."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from minivlm import CLIP, CLIPConfig, Flamingo, LanguageModel, Processor
from minivlm.checkpoint import load, save
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.layers import LanguageModelConfig, TextConfig, VisionConfig
from minivlm.pretrained import mpt, names, open_clip, openflamingo
from minivlm.processor import ProcessorConfig
from minivlm.special_tokens import Markup
from tests.languages import REDPAJAMA
from tests.sentencepiece import llama_tokenizer

SEES = VisionConfig(width=16, depth=2, heads=2, image_size=16, patch_size=8, activation="quick_gelu")
READS = TextConfig(width=16, depth=1, heads=2, vocab_size=40, context=8, causal=True, end_token=3)
WORDS = llama_tokenizer().get_vocab_size()
PLAIN = dict(width=24, depth=4, heads=4, context=64, qkv_bias=False, out_bias=False, mlp_bias=False)
MPT = LanguageModelConfig(**PLAIN, vocab_size=WORDS, positions="none", alibi=True, norm_bias=False)
LLAMA = LanguageModelConfig(
    **PLAIN, vocab_size=WORDS, positions="none", rope_theta=1e4, norm="rmsnorm", gated_mlp=True, activation="silu"
)
OPT = replace(MPT, positions="learned", position_offset=2, alibi=False, norm_bias=True, activation="relu",
              qkv_bias=True, out_bias=True, mlp_bias=True)  # fmt: skip
NEOX = replace(
    REDPAJAMA, **{k: PLAIN[k] for k in ("width", "depth", "heads", "context")}, mlp_width=None, vocab_size=WORDS
)
BLOCKS = {
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
    "llama": "model.layers",
    "opt": "model.decoder.layers",
}
SPEAKERS = {"mpt": MPT, "llama": LLAMA, "opt": OPT, "gpt_neox": NEOX}


def sentence(error):
    assert "\n" not in str(error.value)


def resampler(width=16, depth=1):
    block = {
        "0.norm_media.weight": (width,),
        "0.norm_media.bias": (width,),
        "0.norm_latents.weight": (width,),
        "0.norm_latents.bias": (width,),
        "0.to_q.weight": (512, width),
        "0.to_kv.weight": (1024, width),
        "0.to_out.weight": (width, 512),
        "1.0.weight": (width,),
        "1.0.bias": (width,),
        "1.1.weight": (4 * width, width),
        "1.3.weight": (width, 4 * width),
    }
    blocks = {f"perceiver.layers.{i}.{n}": s for i in range(depth) for n, s in block.items()}
    return {
        "perceiver.latents": (64, width),
        "perceiver.norm.weight": (width,),
        "perceiver.norm.bias": (width,),
        **blocks,
    }


def gated(layers, places, width=24, context=16):
    block = {
        "attn_gate": (1,),
        "ff_gate": (1,),
        "attn.norm.weight": (width,),
        "attn.norm.bias": (width,),
        "attn.to_q.weight": (512, width),
        "attn.to_kv.weight": (1024, context),
        "attn.to_out.weight": (width, 512),
        "ff.0.weight": (width,),
        "ff.0.bias": (width,),
        "ff.1.weight": (4 * width, width),
        "ff.3.weight": (width, 4 * width),
    }
    return {f"lang_encoder.{layers}.{i}.gated_cross_attn_layer.{n}": s for i in places for n, s in block.items()}


def build(directory, speaker="mpt", places=(1, 3)):
    """The directory, and what was trained; three words are added."""
    vision = CLIP(CLIPConfig(vision=SEES, text=READS, embed_width=12))
    save(directory / "clip", vision, layout="hf")
    lang = LanguageModel(SPEAKERS[speaker], seed=1)
    save(directory / "lang", lang, Processor(llama_tokenizer(), ProcessorConfig(context=64)), layout="hf")
    words = torch.cat([lang.token_embedding.weight.detach(), torch.randn(3, 24)])
    table = {"mpt": "transformer.wte", "llama": "model.embed_tokens", "opt": "model.decoder.embed_tokens"}
    shapes = {**resampler(), **gated(BLOCKS[speaker], places)}
    trained = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    trained[f"lang_encoder.{table.get(speaker, 'gpt_neox.embed_in')}.weight"] = words
    if speaker == "gpt_neox":  # the only one whose head is no embedding; "embed" is in its name all the same
        trained["lang_encoder.embed_out.weight"] = torch.randn(len(words), 24)
    torch.save(trained, directory / "checkpoint.pt")
    return trained, vision, lang, words


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_the_three_parts_are_one_model(speaker, tmp_path):
    trained, vision, lang, words = build(tmp_path, speaker)
    model, _ = load(tmp_path)
    c = model.config
    assert (list(c.block_indices), c.every, c.offset, c.attend_to, c.class_token, c.vision_norm) == (
        [1, 3],
        2,
        1,
        "last",
        False,
        False,
    )
    assert (c.latents, c.resampler.depth, c.language.vocab_size) == (64, 1, WORDS + 3)
    assert torch.equal(model.language_model.token_embedding.weight, words)
    if speaker == "gpt_neox":
        assert torch.equal(model.language_model.head.weight, trained["lang_encoder.embed_out.weight"])
    rest = {n: t for n, t in lang.state_dict().items() if n not in ("token_embedding.weight", "head.weight")}
    state = model.language_model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in rest.items()) and len(state) == len(rest) + 2
    assert all(torch.equal(t, vision.vision.state_dict()[n]) for n, t in model.vision.state_dict().items())
    gate = f"lang_encoder.{BLOCKS[speaker]}.3.gated_cross_attn_layer."
    assert torch.equal(model.gated[1].attention_gate, trained[gate + "attn_gate"])
    assert torch.equal(model.gated[1].attention.v_proj.weight, trained[gate + "attn.to_kv.weight"][512:])
    assert torch.equal(model.resampler.blocks[0].mlp.down_proj.weight, trained["perceiver.layers.0.1.3.weight"])
    tokens = torch.tensor([[5, c.image_token, 6, 7]])
    assert model(torch.randn(1, 1, 3, 16, 16), tokens).logits.isfinite().all()


def test_tokens_that_are_added(tmp_path):
    build(tmp_path)
    model, processor = load(tmp_path)
    words = llama_tokenizer().get_vocab_size()
    named = {t: processor.tokenizer.token_to_id(t) for t in ("<|endofchunk|>", "<image>")}
    assert named == {"<|endofchunk|>": words, "<image>": words + 1}
    assert model.config.image_token == words + 1 and model.config.language.end_tokens == (words,)
    assert processor.config.image_tokens == 1 and processor.image_token_id == words + 1
    assert processor.config.chat == "openflamingo"
    assert (processor.image_size, processor.config.resize, processor.config.crop) == (16, "shortest", "floor")
    tokens, _ = processor.text([[Markup("<image>"), "a cat", Markup("<|endofchunk|>")]])
    assert tokens[0].tolist().count(words + 1) == 1 and tokens[0, -1] == words


def test_tokens_that_are_there(tmp_path):
    build(tmp_path)
    path = tmp_path / "lang" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|endofchunk|>", "<image>", "<PAD>"])
    tokenizer.save(str(path))
    (tmp_path / "lang" / "tokenizer_config.json").unlink()
    path = tmp_path / "lang" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": WORDS + 3}))
    model, processor = load(tmp_path)
    assert processor.vocab_size == WORDS + 3 and processor.pad_token == WORDS + 2
    assert model.config.language.pad_token == WORDS + 2


def logits(directory):
    model, _ = load(directory)
    torch.manual_seed(0)
    tokens = torch.tensor([[5, model.config.image_token, 6, 7]])
    return model(torch.randn(1, 1, 3, 16, 16), tokens).logits


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda w: {f"module.{n}": t for n, t in w.items()},
        lambda w: {"model_state_dict": w, "epoch": 3, "lr": 0.1},
        lambda w: {**w, "vision_encoder.class_embedding": torch.ones(3), "lang_encoder.old_decoder_blocks.0.a": torch.ones(1)},
        lambda w: {n.replace("transformer.blocks.", "gated_cross_attn_layers.").replace("gated_cross_attn_layer.", ""): t for n, t in w.items()},
    ],
    ids=["in parallel", "a training state", "copies of frozen weights", "the first files"],
)  # fmt: skip
def test_other_spellings(rewrite, tmp_path):
    trained, *_ = build(tmp_path)
    expected = logits(tmp_path)
    torch.save(rewrite(trained), tmp_path / "checkpoint.pt")
    assert torch.allclose(logits(tmp_path), expected, atol=1e-5)


@pytest.mark.parametrize("part", ["clip", "lang"])
def test_a_part_that_is_not_there(part, tmp_path):
    build(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(
        UserError, match="holds what OpenFlamingo trained, but not what it was trained on: put the CLIP"
    ) as e:
        load(tmp_path)
    sentence(e)


@pytest.mark.parametrize(("part", "other"), [("clip", "lang"), ("lang", "clip")])
def test_parts_in_each_others_places(part, other, tmp_path):
    build(tmp_path)
    shutil.rmtree(tmp_path / part)
    shutil.copytree(tmp_path / other, tmp_path / part)
    with pytest.raises(UserError, match=rf"{part} holds a \w+; it should be a (CLIP with a ViT|language model)\.$"):
        load(tmp_path)


def test_another_language_model(tmp_path):
    build(tmp_path)
    path = tmp_path / "lang" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_layers": 6}))
    with pytest.raises(UserError, match="has 6 blocks: its gated layers stand before blocks 1, 3") as e:
        load(tmp_path)
    sentence(e)
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_layers": 4, "d_model": 32}))
    with pytest.raises(UserError, match="of another shape or kind") as e:
        load(tmp_path)
    sentence(e)


def test_no_checkpoint_of_openflamingo(tmp_path):
    trained, *_ = build(tmp_path)
    torch.save({n: t for n, t in trained.items() if "gated" not in n}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="is no OpenFlamingo checkpoint: it holds no gated cross-attention"):
        load(tmp_path)
    torch.save({n: t for n, t in trained.items() if "latents" not in n}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"is no OpenFlamingo checkpoint: it holds no perceiver\.latents"):
        load(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    trained, *_ = build(tmp_path)
    torch.save({n: t for n, t in trained.items() if n != "perceiver.norm.bias"}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"1 missing \(perceiver\.norm\.bias\)"):
        load(tmp_path)


def test_openflamingo_3b_name_by_name():
    """ViT-L/14, and the MosaicGPT that anas-awadalla/mpt-1b-redpajama-200b is: names and shapes, without memory."""
    speaker = {"model_type": "mosaic_gpt", "attn_qk_ln": True, "alibi": True, "no_bias": True, "vocab_size": 50368}
    lang = replace(mpt.read_config(speaker), vocab_size=50280)
    tower = VisionConfig(width=1024, depth=24, heads=16, patch_size=14, activation="quick_gelu")
    shapes = {**resampler(1024, 6), **gated("transformer.blocks", range(24), 2048, 1024)}
    meta = lambda shapes: {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    where = "checkpoint.pt"
    layers, places = openflamingo.gated_blocks(meta(shapes), where)
    config = openflamingo.FlamingoConfig(
        **openflamingo.read_vision_features(meta(shapes), tower, where),
        **openflamingo.read_gated(lang, places, where),
        image_token=50278,
    )
    d = 2048
    block = {"ln_1.weight": (d,), "attn.Wqkv.weight": (3 * d, d), "attn.q_ln.weight": (d,), "attn.k_ln.weight": (d,)}
    block |= {"attn.out_proj.weight": (d, d), "ln_2.weight": (d,)}
    block |= {"mlp.mlp_up.weight": (4 * d, d), "mlp.mlp_down.weight": (d, 4 * d)}
    mosaic = {f"transformer.blocks.{i}.{n}": s for i in range(24) for n, s in block.items()}
    mosaic |= {"transformer.wte.weight": (50280, d), "transformer.ln_f.weight": (d,)}
    clip = empty_model(CLIP, CLIPConfig(vision=tower, text=READS, embed_width=768)).state_dict()
    clip = names.to_theirs({n: t for n, t in clip.items() if n.startswith("vision.")}, open_clip.VIT)
    shapes |= {f"lang_encoder.{n}": s for n, s in mosaic.items()}
    shapes |= {f"vision_encoder.{n}": tuple(t.shape) for n, t in clip.items()}
    rows = openflamingo.rows(config, layers, mpt.rows, open_clip.VIT)
    ours = empty_model(Flamingo, config)
    names.to_ours(
        meta(shapes), ours.state_dict(keep_vars=True), rows, "3B"
    )  # raises unless every name and shape agrees
    new = sum(p.numel() for part in ours.trained_parts for p in ours.get_submodule(part).parameters())
    assert (layers, config.every, len(ours.gated)) == ("lang_encoder.transformer.blocks.", 1, 24)
    gated_layer = 2 * 512 * d + 1024 * 1024 + 8 * d * d + 4 * d + 2
    assert new == 24 * gated_layer + sum(torch.Size(s).numel() for s in resampler(1024, 6).values())
