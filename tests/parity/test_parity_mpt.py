"""MPT against transformers.MptForCausalLM, in both directions."""

import pytest
import torch

import minivlm
from minivlm.pretrained import comparable, mpt

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

V = 60
VARIANTS = {"mpt": {}, "six heads": {"n_heads": 6, "d_model": 36}, "one head": {"n_heads": 1}}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def reference(changes):
    config = transformers.MptConfig(
        **{"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, **changes}
    )
    model = transformers.MptForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def compare(ours, theirs, close):
    """One row in full, one padded on the left, and what both say."""
    tokens = torch.randint(4, V, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    with torch.no_grad():
        close(ours(tokens, mask).logits[mask], theirs(tokens, attention_mask=mask.long()).logits[mask])
    for row, real in zip(tokens, mask, strict=True):
        prompt = row[real][None]
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 12}
        expected = theirs.generate(prompt, **options)[0, prompt.shape[1] :].tolist()
        assert ours.generate(prompt, max_new_tokens=12)[0].tolist() == expected
    said = ours.generate(tokens, mask, max_new_tokens=12)
    assert said[1].tolist() == expected


@every_variant
def test_saved_by_transformers_loaded_by_us(changes, tmp_path, close):
    theirs = reference(changes)
    theirs.save_pretrained(tmp_path)
    compare(minivlm.load(tmp_path)[0], theirs, close)


@every_variant
def test_saved_by_us_loaded_by_transformers(changes, tmp_path, close):
    reference(changes).save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    theirs, info = transformers.MptForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(ours, theirs.eval(), close)


def test_defaults_are_those_of_transformers():
    theirs = transformers.MptConfig().to_dict()
    assert comparable(mpt.read_config({})) == comparable(mpt.read_config(theirs))
