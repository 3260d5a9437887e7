"""What tokenizer_config.json changes in tokenizer.json."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import BERT, BERTConfig
from minivlm.pretrained.preprocessing import read_tokenizer
from minivlm.processor import Processor, ProcessorConfig
from minivlm.text_stream import TextStream

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "café", "Café", "two", "Two", "你", "你好"]


def write(directory, tokenizer, **about):
    (directory / "tokenizer.json").write_text(tokenizer if isinstance(tokenizer, str) else tokenizer.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(about))


def words(directory, family, text):
    source = read_tokenizer(directory, family)
    processor = Processor(source, ProcessorConfig(pad_token=0))
    return [processor.tokenizer.id_to_token(id) for id in processor.encode([text])[0]]


def bert():
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(PIECES[:5])
    return tokenizer


def gemma():
    """Gemma's kind of tokeniser, as SigLIP 2 has it: text <eos>."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*special, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdtADT.!", "at", "cat"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab, [("a", "t"), ("c", "at")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({}, ["two", "cafe", "你", "[UNK]"]),
        ({"do_lower_case": False}, ["Two", "Café", "你", "[UNK]"]),
        ({"strip_accents": False}, ["two", "café", "你", "[UNK]"]),
        ({"do_lower_case": False, "strip_accents": True}, ["Two", "[UNK]", "你", "[UNK]"]),
        ({"tokenize_chinese_chars": False}, ["two", "cafe", "你好"]),
        ({"tokenizer_class": "BertTokenizerFast", "do_lower_case": False}, ["Two", "Café", "你", "[UNK]"]),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}, ["two", "cafe", "你", "[UNK]"]),
    ],
)
def test_berts_normaliser_is_made_of_the_config(about, expected, tmp_path):
    tokenizer = bert()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    write(
        tmp_path,
        tokenizer,
        tokenizer_class="BertTokenizer",
        **{k: v for k, v in about.items() if k != "tokenizer_class"},
    )
    if "tokenizer_class" in about:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    assert words(tmp_path, "BertTokenizer", "Two Café 你好") == ["[CLS]", *expected, "[SEP]"]


def test_vocab_txt_alone_is_a_tokeniser_of_bert(tmp_path):
    pieces = [*PIECES[:5], "\u2028", *PIECES[5:]]  # a token that ends a line for some
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    assert json.loads(read_tokenizer(tmp_path, "BertTokenizer"))["model"]["vocab"] == {
        p: i for i, p in enumerate(pieces)
    }
    assert words(tmp_path, "BertTokenizer", "Two café") == ["[CLS]", "two", "cafe", "[SEP]"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert words(tmp_path, "BertTokenizer", "Two Café") == ["[CLS]", "Two", "Café", "[SEP]"]
    assert read_tokenizer(tmp_path, "T5Tokenizer") is None


def bytes_of(*special):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer"])
def test_a_space_before_every_text(kind, tmp_path):
    for wanted, expected in ((True, ["Ġ", "a"]), (False, ["a"]), (None, ["a"])):
        write(tmp_path, bytes_of(), tokenizer_class=kind, **({} if wanted is None else {"add_prefix_space": wanted}))
        assert words(tmp_path, None, "a") == expected


def test_a_missing_post_processor_is_the_classes(tmp_path):
    write(tmp_path, bert(), do_lower_case=True)
    assert words(tmp_path, "BertTokenizer", "two") == ["[CLS]", "two", "[SEP]"]
    write(tmp_path, bert(), cls_token={"content": "[MASK]"}, sep_token="[PAD]")
    assert words(tmp_path, "BertTokenizer", "two") == ["[MASK]", "two", "[PAD]"]
    vocab = {"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}
    clip = Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    clip.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    write(tmp_path, clip)
    assert words(tmp_path, "CLIPTokenizer", " A a ") == ["<|startoftext|>", "a</w>", "a</w>", "<|endoftext|>"]
    t5 = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0)], unk_id=2))
    write(tmp_path, t5)
    assert words(tmp_path, "T5Tokenizer", "a a") == ["▁a", "▁a", "</s>"]
    write(tmp_path, bytes_of("<|endoftext|>"), add_bos_token=True)  # of GPT-2's, nothing stands before a text
    assert words(tmp_path, "GPT2Tokenizer", "a") == ["a"]


def test_bos_flags_are_without_effect_beside_a_tokenizer_json(tmp_path):
    tokenizer = bytes_of("<|endoftext|>")
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    tokenizer.post_processor = template
    for flags in ({}, {"add_bos_token": False}, {"add_eos_token": True}):
        write(tmp_path, tokenizer, tokenizer_class="GPT2Tokenizer", **flags)
        assert words(tmp_path, None, "a") == ["<|endoftext|>", "a"]


def test_siglip_may_keep_capitals(tmp_path):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("A", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    for lower, letter in ((True, "a"), (False, "A")):
        write(tmp_path, tokenizer, tokenizer_class="SiglipTokenizer", do_lower_case=lower)
        assert words(tmp_path, "SiglipTokenizer", "A") == [letter, "</s>"]


def test_siglip_2_reads_lower_case_where_its_files_say_so(tmp_path):
    for about, letter in (
        ({"tokenizer_class": "GemmaTokenizer", "do_lower_case": True}, "a"),
        ({"tokenizer_class": "GemmaTokenizerFast", "do_lower_case": True}, "a"),
        ({"tokenizer_class": "GemmaTokenizer"}, "A"),
        ({"tokenizer_class": "Siglip2Tokenizer"}, "a"),
    ):
        write(tmp_path, gemma(), **about)
        assert words(tmp_path, "SiglipTokenizer", "A a") == [letter, "▁", "a", "<eos>"]


@pytest.mark.parametrize("wanted", [True, False])
def test_spaces_in_what_is_said(wanted, tmp_path):
    """As published, with BERT's words, there and back; the words of a stream are those of the whole."""
    pieces = [*PIECES, "'", "s", "n", "t", ".", "it", ","]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    model = BERT(BERTConfig(vocab_size=len(pieces), context=12, width=16, depth=1, heads=2))
    save(tmp_path, model, Processor(tokenizer, ProcessorConfig(context=12, pad_token=0)), layout="hf")
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about["clean_up_tokenization_spaces"] is False
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**about, "clean_up_tokenization_spaces": wanted}))
    processor = load(tmp_path)[1]
    [ids] = processor.encode(["it's two, two."])
    expected = "it's two, two." if wanted else "it ' s two , two ."
    assert processor.decode([ids]) == [expected]
    stream = TextStream(processor.decode, words=processor.tidies)
    assert "".join([*(stream.feed(token) for token in ids), stream.end()]) == expected
    save(tmp_path / "ours", model, processor)
    assert load(tmp_path / "ours")[1].decode([ids]) == [expected]


def test_tokens_that_the_config_alone_has(tmp_path):
    mark = {"content": "<image>", "special": True}
    write(tmp_path, bytes_of("<s>"), added_tokens_decoder={"256": {"content": "<s>"}, "257": mark})
    source = read_tokenizer(tmp_path, "LlamaTokenizer")
    assert Tokenizer.from_buffer(source).token_to_id("<image>") == 257
    write(tmp_path, bytes_of("<s>"), added_tokens_decoder={"300": mark})
    with pytest.raises(UserError, match=r"gives '<image>' the number 300, but beside .*tokenizer\.json it is 257"):
        read_tokenizer(tmp_path, "LlamaTokenizer")


def test_added_tokens_json_beside_vocabulary_and_merges(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "added_tokens.json").write_text('{"<image>": 3}')
    tokenizer = Processor(read_tokenizer(tmp_path, "CLIPTokenizer"), ProcessorConfig()).tokenizer
    assert tokenizer.token_to_id("<image>") == 3
    (tmp_path / "added_tokens.json").write_text('{"<image>": 9}')
    with pytest.raises(UserError, match=r"gives '<image>' the number 9, but it is 3"):
        read_tokenizer(tmp_path, "CLIPTokenizer")


def test_what_changes_nothing_is_read_as_it_is(tmp_path):
    tokenizer = bytes_of("<s>")
    write(tmp_path, tokenizer, tokenizer_class="LlamaTokenizer", model_max_length=77)
    assert read_tokenizer(tmp_path, "LlamaTokenizer") == tokenizer.to_str().encode()
    for broken in ('{"model": {}}', "[]"):
        write(tmp_path, broken, tokenizer_class="BertTokenizer")
        with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokeniser"):
            read_tokenizer(tmp_path, "BertTokenizer")
