"""GGUF files against the gguf package, which dequantises, and against transformers."""

import numpy as np
import pytest
import torch

import minivlm
from minivlm.pretrained.gguf_file import GGUF
from tests.gguf_files import byte_pair_words, metadata_of, their_tensors, tiny_model, write_gguf

gguf = pytest.importorskip("gguf", reason="gguf is not installed (tests/requirements.txt)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

QUANTISATIONS = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "BF16",
)
WORDS = byte_pair_words("qwen2")
TEXTS = ["the cat's 123 acat", "  two\n\n cafés, 你好!", "<|im_start|>user"]


@pytest.mark.parametrize("name", QUANTISATIONS)
def test_a_tensor_is_what_the_package_makes_of_its_blocks(name, tmp_path):
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 512 // block * size), dtype=np.uint8)
    blocks &= 0x33  # scales in half precision are finite
    write_gguf(
        tmp_path / "a.gguf", {"general.architecture": "llama"}, {"w.weight": ((3, 512), int(kind), blocks.tobytes())}
    )
    ours = GGUF(tmp_path / "a.gguf")["w.weight"]
    assert torch.equal(ours.float(), torch.from_numpy(np.array(gguf.dequantize(blocks, kind), dtype=np.float32)))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_quantised_file_gives_the_logits_and_tokens_that_transformers_does(kind, tmp_path, close):
    model = tiny_model(len(WORDS["tokens"]), qkv_bias=kind == "qwen2")
    tensors = their_tensors(model, kind)
    for name in [name for name in tensors if "ffn" in name or "attn_q.weight" in name]:
        if "norm" not in name:
            eight = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quantize(tensors[name].numpy(), eight).tobytes()
            tensors[name] = (tuple(tensors[name].shape), int(eight), data)
    write_gguf(tmp_path / "model.gguf", metadata_of(model, WORDS, kind), tensors)
    in_full = {"gguf_file": "model.gguf", "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **in_full).eval()
    ours, processor = minivlm.load(tmp_path)
    tokens = torch.randint(250, (2, 12))
    with torch.no_grad():
        close(ours(tokens).logits, theirs(tokens).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert [processor.tokenizer.encode(text).ids for text in TEXTS] == tokenizer(TEXTS)["input_ids"]
