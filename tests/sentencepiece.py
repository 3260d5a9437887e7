"""A small tokeniser of LLaMA's kind: "▁" for a space and in front of every text, bytes for what has no token."""


def llama_tokenizer(*added):
    """<unk> 0, <s> 1, </s> 2, the 256 bytes, some letters and pieces; `added` are the last, as special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    special = ["<unk>", "<s>", "</s>"]
    merges = [tuple(pair.split()) for pair in ("▁ a", "▁ t", "h e", "▁t he", "c a", "ca t", "▁ cat", "U S", "E R")]
    pieces = [*"▁abcdefghijklmnopqrstuvwxyzUSERAINT:?.", *(a + b for a, b in merges)]
    vocab = {t: i for i, t in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([*special, *added])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
