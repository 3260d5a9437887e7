"""BLIP against transformers, by its three uses: in both directions, and by name in the published sizes."""

import json

import numpy as np
import pytest
import torch

import minivlm
from minivlm.empty_model import empty_model
from minivlm.pretrained import blip, names

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

V, CLS, SEP, DEC = 60, 2, 3, 58
VISION = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 30,
    "bos_token_id": DEC,
    "sep_token_id": SEP,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CLASSES = {
    "caption": "BlipForConditionalGeneration",
    "answer": "BlipForQuestionAnswering",
    "match": "BlipForImageTextRetrieval",
}
VARIANTS = [
    ("caption", {}, {}),
    ("caption", {"hidden_size": 32, "num_hidden_layers": 3, "hidden_act": "relu"}, {"patch_size": 12}),
    ("answer", {}, {}),
    ("answer", {"num_attention_heads": 2, "layer_norm_eps": 1e-6}, {"hidden_act": "quick_gelu"}),
    ("match", {}, {}),
    ("match", {"hidden_size": 20}, {"num_attention_heads": 3, "layer_norm_eps": 1e-6}),
]


def reference(roles, text, vision):
    config = transformers.BlipConfig(
        vision_config={**VISION, **vision}, text_config={**TEXT, **text}, image_text_hidden_size=14
    )
    model = getattr(transformers, CLASSES[roles])(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def compare(roles, ours, theirs, images, close):
    tokens = torch.randint(8, 50, (2, 7))
    tokens[:, 0], tokens[:, -1] = CLS, SEP
    mask = torch.arange(7) < torch.tensor([[7], [5]])
    pixels = images(2, 24)
    given = {"pixel_values": pixels, "input_ids": tokens, "attention_mask": mask.long()}
    with torch.no_grad():
        if roles == "match":
            close(ours.match(pixels, tokens, mask), theirs(**given).itm_score)
            cosines = ours.encode_image(pixels) @ ours.encode_text(tokens, mask).T
            close(cosines, theirs(**given, use_itm_head=False).itm_score)
        elif roles == "caption":
            close(ours(pixels, tokens, mask).logits[mask], theirs(**given).logits[mask])
        else:
            whole = {**given, "attention_mask": torch.ones_like(tokens)}  # theirs loses the mask in its decoder
            answers = torch.randint(8, 50, (2, 4))
            answers[:, 0] = DEC
            close(ours(pixels, tokens, None, answers).loss, theirs(**whole, labels=answers).loss)
    if roles != "match":
        beginning = tokens if roles == "answer" else tokens[:, :4]
        said = ours.generate(pixels, beginning, mask[:, : beginning.shape[1]], max_new_tokens=8).tolist()
        if roles == "answer":
            expected = theirs.generate(**given, do_sample=False, num_beams=1, max_new_tokens=8)[:, 1:]
        else:  # it drops the last token, which a tokeniser would have put there
            framed = torch.cat([beginning, torch.full((2, 1), SEP)], dim=1)
            expected = theirs.generate(
                pixel_values=pixels, input_ids=framed, do_sample=False, num_beams=1, max_new_tokens=8
            )
            expected = expected[:, 4:]
        for answer, known in zip(said, expected.tolist(), strict=True):
            end = known.index(SEP) + 1 if SEP in known else len(known)
            assert answer[:end] == known[:end]


@pytest.mark.parametrize(("roles", "text", "vision"), VARIANTS, ids=lambda x: str(x)[:30])
def test_saved_by_transformers_loaded_by_us_and_back(roles, text, vision, tmp_path, images, close):
    theirs = reference(roles, text, vision)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    assert ours.config.roles == roles
    compare(roles, ours, theirs, images, close)
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    cls = getattr(transformers, CLASSES[roles])
    back, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(roles, ours, back.eval(), images, close)


def test_a_head_that_is_stored_beside_the_embedding(tmp_path, images, close):
    """As the published files have it, with one name of the bias or the other."""
    from safetensors.torch import load_file, save_file

    theirs = reference("caption", {}, {})
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    predictions = "text_decoder.cls.predictions"
    weights[f"{predictions}.decoder.weight"] = weights["text_decoder.bert.embeddings.word_embeddings.weight"].clone()
    for kept, other in (("bias", "decoder.bias"), ("decoder.bias", "bias")):
        bias = weights.get(f"{predictions}.{kept}", weights.get(f"{predictions}.{other}"))
        some = {name: t for name, t in weights.items() if not name.endswith(f"{predictions}.{other}")}
        save_file({**some, f"{predictions}.{kept}": bias.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
        ours, _ = minivlm.load(tmp_path)
        compare("caption", ours, theirs, images, close)


@pytest.mark.parametrize("roles", CLASSES)
def test_published_sizes_by_name(roles):
    """Their config.json says no more than this: the rest is the class's own."""
    values = {"architectures": [CLASSES[roles]], "model_type": "blip", "text_config": {"num_attention_heads": 12}}
    config = blip.read_config(values)
    assert (config.vision.image_size, config.vision.patches, config.text.heads, config.text.depth) == (384, 576, 12, 12)
    assert (config.decode_token, config.end_token, config.text.vocab_size) == (30522, 102, 30524)
    model = empty_model(blip.model_class, config)
    with torch.device("meta"):
        theirs = getattr(transformers, CLASSES[roles])(transformers.BlipConfig(text_config={"num_attention_heads": 12}))
    theirs = {name: t for name, t in theirs.state_dict(keep_vars=True).items() if "position_ids" not in name}
    found = names.to_ours(theirs, model.state_dict(keep_vars=True), blip.rows(config), "the published model")
    ours = model.state_dict()
    assert all(found[name].shape == tensor.shape for name, tensor in ours.items()) and found.keys() == ours.keys()
    assert sum(p.numel() for p in model.parameters()) == sum({id(t): t.numel() for t in theirs.values()}.values())


def test_pictures_are_prepared_alike(tmp_path):
    from PIL import Image

    theirs = transformers.BlipImageProcessorPil(size={"height": 24, "width": 24})
    reference("match", {}, {}).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 24, "width": 24}}))
    _, processor = minivlm.load(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 31, 3), dtype=np.uint8))
    expected = theirs(picture, return_tensors="pt")["pixel_values"]
    assert (processor.images([picture]) - expected).abs().max() < 1e-5
