"""What a text spells stays text, with every kind of tokeniser; special tokens are put in by the program."""

import json
from dataclasses import replace

import pytest
from sentencepiece import llama_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minivlm.conversation import Turn, encode_conversation, with_images
from minivlm.datasets.span_corruption import with_sentinels
from minivlm.processor import Processor, ProcessorConfig
from minivlm.special_tokens import Markup, as_text, split_placeholders

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def ours():
    return Processor.train(["a photo of a cat", "a photo of a dog"], vocab_size=300, image_size=8, context=32).tokenizer


def byte_level(start, end, suffix=None):
    """Like GPT-2's, or like CLIP's, whose words have an end."""
    tokens = [*BYTES, *(c + suffix for c in BYTES if suffix), start, end]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[], **({"unk_token": end, "end_of_word_suffix": suffix} if suffix else {}))
    )
    tokenizer.normalizer = normalizers.Lowercase() if suffix else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([start, end])
    ids = [(token, vocab[token]) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)
    return tokenizer


def bert():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz[]<>|_/0123456789"
    vocab = {token: i for i, token in enumerate([*special, *letters, *(f"##{c}" for c in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def t5():
    special = ["<pad>", "</s>", "<unk>"]
    pieces = ["▁", "▁a", *"abcdefghijklmnopqrstuvwxyz<>_/0123456789[]|"]
    holes = [f"<extra_id_{i}>" for i in range(12)]
    vocab = [(t, 0.0) for t in special] + [(p, -2.0) for p in pieces] + [(hole, 0.0) for hole in holes]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*special, *holes])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


TOKENIZERS = {
    "ours": ours,
    "gpt2": lambda: byte_level("<|endoftext|>", "<|im_end|>"),
    "clip": lambda: byte_level("<|startoftext|>", "<|endoftext|>", "</w>"),
    "bert": bert,
    "t5": t5,
    "llama": lambda: llama_tokenizer("<image>", "<pad>"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def processor(request):
    return Processor(TOKENIZERS[request.param](), ProcessorConfig(image_size=8))


def special_ids(processor):
    """Those of the tokens that stand for something else than words, unknown ones not among them."""
    added = processor.tokenizer.get_added_tokens_decoder()
    return {i: token.content for i, token in added.items() if "unk" not in token.content.lower()}


def test_no_text_spells_a_special_token(processor):
    special = special_ids(processor)
    for name in special.values():
        for text in (f"a {name} b", name, f"{name}{name}a", f"a{name}"):
            [whole] = processor.encode([text])
            plain = processor.ids(text)
            assert not special.keys() & set(plain)
            assert plain and plain == whole[processor.special_tokens.before :][: len(plain)]
            assert len(whole) == len(processor.encode(["a"])[0]) - len(processor.ids("a")) + len(plain)
            same = lambda text: "".join(text.lower().split())
            assert same(processor.decode([plain])[0]) == same(text)  # not a sign of it is lost


def test_texts_that_differ_behind_a_special_token_differ(processor):
    for name in special_ids(processor).values():
        one, other = processor.encode([f"a {name} b", f"a {name} c"])
        assert one != other


def test_an_unknown_sign_is_still_unknown_and_its_name_is_a_word():
    for make, name in ((bert, "[UNK]"), (t5, "<unk>")):
        processor = Processor(make(), ProcessorConfig(image_size=8))
        unknown = processor.tokenizer.token_to_id(name)
        assert processor.ids("a 左").count(unknown) == 1
        assert processor.ids(f"a {name}").count(unknown) == 0
        assert processor.ids(f"a 左 {name}").count(unknown) == 1


def test_what_only_looks_like_a_special_token_once_it_is_normalised_is_text_too():
    processor = Processor(t5(), ProcessorConfig(image_size=8))
    assert not special_ids(processor).keys() & set(processor.ids("a ＜pad＞ b"))  # NFKC makes it <pad>


def test_an_ordinary_text_has_the_tokenisers_own_ids(processor):
    for text in ("a photo of a cat", "", " a  b ", "a < b [c] | d / 0x0a"):
        assert processor.encode([text])[0] == processor.tokenizer.encode(text).ids
        assert processor.ids(text) == processor.tokenizer.encode(text, add_special_tokens=False).ids


def test_an_added_word_that_is_not_special_stays_one_token():
    tokenizer = ours()
    tokenizer.add_tokens(["covid"])
    processor = Processor(tokenizer, ProcessorConfig(image_size=8))
    [word] = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.content == "covid"]
    assert word in processor.ids("a covid") and word in processor.ids("a covid <end>")


def test_markup_is_special_tokens_and_the_text_between_is_not(processor):
    name, token = next((name, i) for i, name in special_ids(processor).items())
    ids = processor.ids([Markup(name), "a ", name, Markup(name)])
    assert ids.count(token) == 2 and ids[0] == ids[-1] == token
    assert ids == [token, *processor.ids([Markup(name), f"a {name}"])[1:], token]
    plain = processor.ids([Markup(name), "a b", Markup(name)])
    assert plain == processor.tokenizer.encode(f"{name}a b{name}", add_special_tokens=False).ids


def test_tokens_that_are_added_later_cannot_be_spelt_either():
    processor = Processor(ours(), ProcessorConfig(image_size=8))
    before = processor.ids("a <mask> b")
    processor.tokenizer.add_special_tokens(["<mask>"])
    assert processor.ids("a <mask> b") == before


def test_a_mark_is_a_picture_where_pictures_stand_in_the_text_and_a_word_elsewhere():
    reads = Processor(ours(), ProcessorConfig(image_size=8, image_tokens=3))
    compares = Processor(reads.tokenizer, replace(reads.config, image_tokens=0))
    image = reads.image_token_id
    assert reads.ids("<image>\na cat").count(image) == 3 and reads.encode(["<image> a"])[0].count(image) == 1
    assert image not in compares.ids("see <image> here") and image not in reads.ids(as_text("see <image> here"))
    assert reads.ids(as_text("see <image> here")) == compares.ids("see <image> here")
    assert split_placeholders(f"<image>{as_text('<image>')}") == ["", "<image>", "<image>"]


def test_a_conversation_of_odd_words_has_no_more_special_tokens_than_any_other():
    odd = "what are <end>, <image>, <start> and <pad>?"
    processor = Processor(ours(), ProcessorConfig(image_size=8, image_tokens=2))
    special = special_ids(processor)
    plain = [Turn("user", with_images("what?")), Turn("assistant", "that")]
    spelt = [Turn("user", with_images(odd)), Turn("assistant", as_text(odd))]
    for turns in ([*plain], [Turn("system", "s"), *plain, Turn("user", "b"), Turn("assistant", "c")]):
        same = [turn for turn in turns if turn not in plain]
        odd_turns = [*(t for t in same if t.role == "system"), *spelt, *(t for t in same if t.role != "system")]
        count = lambda sample: [token for token in sample.tokens if token in special]
        assert count(encode_conversation(odd_turns, processor)) == count(encode_conversation(turns, processor))


def test_a_text_with_holes_has_only_its_own():
    processor = Processor(t5(), ProcessorConfig(image_size=8, context=64))
    holes = {i for i, name in special_ids(processor).items() if "extra" in name}
    read, said = with_sentinels(["a <extra_id_3>", "b </s>", "c"], processor)
    assert sum(token in holes for token in read) == 1 == sum(token in holes for token in said)
    assert read.count(processor.end_token) == 1


def test_what_was_saved_before_is_read_as_it_was():
    tokenizer = ours()
    again = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str())))
    config = ProcessorConfig(image_size=8)
    for text in ("a photo of a cat", "A  Photo of\na dog!"):
        assert Processor(again, config).encode([text]) == [tokenizer.encode(text).ids]
