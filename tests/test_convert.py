"""python -m minivlm convert: a model in another layout, adapters merged, nothing overwritten."""

import pytest
import torch

import minivlm
from minivlm.__main__ import main
from minivlm.adapters import save_adapter
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.lora import LoRAConfig, add_lora, lora_parameters

CONFIG = LanguageModelConfig(width=16, depth=1, heads=2, vocab_size=20, context=32)


@pytest.fixture
def adapted(tmp_path):
    """A base in tmp_path/"base", an adapter in tmp_path/"adapter", and the two in one."""
    model = LanguageModel(CONFIG)
    model.bfloat16().save_pretrained(tmp_path / "base")
    model.float()
    config = LoRAConfig(rank=2)
    add_lora(model, config)
    for p in lora_parameters(model):
        torch.nn.init.normal_(p, std=0.1)
    save_adapter(tmp_path / "adapter", model, base=str(tmp_path / "base"), config=config)
    return minivlm.load(tmp_path / "adapter")[0]


def test_an_adapter_becomes_part_of_the_weights_and_the_precision_stays(adapted, tmp_path, capsys):
    main(["convert", str(tmp_path / "adapter"), str(tmp_path / "whole")])
    assert "as transformers reads it" in capsys.readouterr().out
    whole, _ = minivlm.load(tmp_path / "whole")
    tokens = torch.arange(8)[None]
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    plain, _ = minivlm.load(tmp_path / "base")
    close = lambda a, b: torch.allclose(a(tokens).logits, b(tokens).logits, atol=0.05)
    assert close(whole, adapted) and not close(plain, adapted)
    main(["convert", str(tmp_path / "whole"), str(tmp_path / "ours"), "--layout", "minivlm", "--dtype", "float32"])
    assert minivlm.load(tmp_path / "ours")[0].dtype == torch.float32


def test_a_directory_that_holds_something_is_not_touched(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already, and not touched"):
        main(["convert", "out/clip", str(tmp_path / "full")])
