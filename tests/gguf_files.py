"""GGUF files of tiny models, written as llama.cpp's specification has them."""

import struct

import torch

from minivlm.layers import LanguageModel, LanguageModelConfig
from minivlm.pretrained import names
from minivlm.pretrained.gguf import rows
from tests.sentencepiece import llama_tokenizer

ALIGNMENT = 32
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
SIZES = {"width": 32, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_width": 64, "context": 64}
LLAMA = {"positions": "none", "gated_mlp": True, "norm": "rmsnorm", "rope_theta": 500.0, "activation": "silu"}
NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(value) -> bytes:
    """The type of a value, and itself."""
    if isinstance(value, list):
        kind, _ = typed(value[0])[:4], None
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(typed(one)[4:] for one in value)
    for type_, code, form in ((bool, 7, "?"), (int, 4, "I"), (float, 6, "f")):
        if isinstance(value, type_):
            return struct.pack("<I", code) + struct.pack(f"<{form}", value)
    return struct.pack("<I", 8) + text(value)


def write_gguf(path, metadata: dict, tensors: dict) -> None:
    """tensors: name → a tensor, or (shape, type, bytes) of a quantised one."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(text(key) + typed(value) for key, value in metadata.items())
    blocks, offset = [], 0
    for name, tensor in tensors.items():
        if torch.is_tensor(tensor):
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            tensor = (tuple(tensor.shape), KINDS[tensor.dtype], data)
        shape, kind, data = tensor
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)
        data += b"\0" * (-len(data) % ALIGNMENT)
        blocks.append(data)
        offset += len(data)
    header += b"\0" * (-len(header) % ALIGNMENT)
    path.write_bytes(header + b"".join(blocks))


def sentencepiece_words() -> dict:
    """The metadata of `llama_tokenizer`, whose merges follow from scores."""
    tokenizer = llama_tokenizer()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    joined = ["▁a", "▁t", "he", "▁the", "ca", "cat", "▁cat", "US", "ER"]
    scores = [-float(joined.index(word)) if word in joined else -1000.0 for word in words]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(words) - 259)
    return {"model": "llama", "tokens": words, "scores": scores, "token_type": kinds, "bos_token_id": 1,
            "eos_token_id": 2, "unknown_token_id": 0}  # fmt: skip


def byte_pair_words(pre="smollm") -> dict:
    from tokenizers import pre_tokenizers

    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*control, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "12", "at", "cat", "<think>"]
    kinds = [3] * 3 + [1] * (len(words) - 4) + [4]
    return {"model": "gpt2", "pre": pre, "tokens": words, "token_type": kinds, "merges": ["Ġ a", "1 2", "a t", "c at"],
            "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2, "add_bos_token": False}  # fmt: skip


def tiny_model(vocab_size: int, **options) -> LanguageModel:
    given = {**SIZES, **LLAMA, **NO_BIAS, "end_tokens": (2,), "pad_token": 2, **options}
    config = LanguageModelConfig(vocab_size=vocab_size, **given)
    model = LanguageModel(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return model


def their_tensors(model: LanguageModel, kind: str = "llama") -> dict[str, torch.Tensor]:
    """The tensors by their names; LLaMA's queries and keys as llama.cpp turns them."""
    state = {name: t for name, t in model.state_dict().items() if name != "head.weight" or not model.config.tie_head}
    tensors = names.to_theirs(state, rows)
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        if kind == "llama" and part in ("attn_q", "attn_k"):
            heads = model.config.heads if part == "attn_q" else model.config.kv_heads
            turned = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2)
            tensors[name] = turned.flatten(0, 2)
    return tensors


def metadata_of(model: LanguageModel, words: dict, kind: str = "llama", **more) -> dict:
    c = model.config
    sizes = {"context_length": c.context, "embedding_length": c.width, "feed_forward_length": c.mlp_width,
             "block_count": c.depth, "attention.head_count": c.heads, "attention.head_count_kv": c.kv_heads,
             "attention.layer_norm_rms_epsilon": c.norm_eps, "rope.freq_base": c.rope_theta,
             "rope.dimension_count": c.width // c.heads, "vocab_size": c.vocab_size}  # fmt: skip
    about = {f"{kind}.{key}": value for key, value in sizes.items()}
    return {"general.architecture": kind, **about, **{f"tokenizer.ggml.{k}": v for k, v in words.items()}, **more}
