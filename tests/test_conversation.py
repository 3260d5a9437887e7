"""Conversations as tokens: what is written, what is learnt, what is cut, and one sentence for every mistake."""

from dataclasses import replace

import pytest
import torch

from minivlm.conversation import (
    IGNORED,
    TEMPLATES,
    Sample,
    Turn,
    check_conversation,
    collate,
    encode_conversation,
    endings,
    with_chat,
    with_images,
)
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.pretrained import language
from minivlm.processor import Processor, ProcessorConfig
from minivlm.recipes.parts import join_processors

TEXTS = [
    "is there a red circle? yes",
    "how many blue shapes are there? two",
    "USER: what colour is it? ASSISTANT: green",
    "describe the picture. a small red circle and a large blue star",
]
PLACES = 5  # placeholders of one picture


@pytest.fixture(scope="module")
def plain():
    """Our own tokeniser: <start> … <end>."""
    processor = Processor.train(TEXTS, vocab_size=400, image_size=32, context=64)
    return Processor(processor.tokenizer, replace(processor.config, image_tokens=PLACES))


@pytest.fixture(scope="module")
def vicuna():
    """Like LLaMA's: spaces are "▁", one is put in front of every text, and only <s> is put around it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    special = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]
    # Words apart, as SentencePiece has them: a piece has its "▁" in front or not at all.
    words = [f" {word}" for text in TEXTS for word in text.split()]
    tokenizer.normalizer, whole = normalizers.Replace(" ", "▁"), tokenizer.normalizer
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=200, special_tokens=[*special, "<0x0A>"], show_progress=False)
    )
    tokenizer.normalizer = whole
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    config = ProcessorConfig(image_size=32, pad_token="<pad>", chat="vicuna", image_tokens=PLACES)
    return Processor(tokenizer, config)


@pytest.fixture(scope="module")
def chatml():
    """Like Qwen2's: byte-level, a word may begin with a colon, nothing is put around a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        [*TEXTS, "a:yes b:yes c:yes"],
        trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    config = ProcessorConfig(image_size=32, pad_token="<|endoftext|>", chat="chatml", image_tokens=PLACES)
    return Processor(tokenizer, config)


QA = [Turn("user", "<image>\nis there a red circle?"), Turn("assistant", "yes")]
FOUR = [*QA, Turn("user", "how many blue shapes are there?"), Turn("assistant", "two blue shapes")]


def learnt(sample):
    return [label for label in sample.labels if label != IGNORED]


def whole(processor, text):
    """The ids of a text that is tokenised at once, with its start token, pictures expanded by hand."""
    ids = [processor.start_token] if processor.start_token is not None else []
    ids += processor.tokenizer.encode(text, add_special_tokens=False).ids
    return [t for i in ids for t in [i] * (PLACES if i == processor.image_token_id else 1)]


# ------------------------------------------------------------------------------------------------------ what is written


def test_the_published_prompt_gets_the_published_ids(vicuna):
    prompt = encode_conversation(QA[:1], vicuna, images=1, prompt=True)
    assert prompt.tokens == whole(vicuna, "USER: <image>\nis there a red circle? ASSISTANT:")
    assert prompt.tokens.count(vicuna.image_token_id) == PLACES
    assert learnt(prompt) == [] and set(prompt.roles) == {"user"}


def test_vicuna_is_the_string_that_llava_was_trained_on(vicuna):
    said = "USER: <image>\nis there a red circle? ASSISTANT: yes</s>USER: how many blue shapes are there? ASSISTANT: two blue shapes</s>"
    sample = encode_conversation(FOUR, vicuna)
    assert sample.tokens == whole(vicuna, said)
    assert vicuna.tokenizer.decode(learnt(sample), skip_special_tokens=False).split("</s>") == [
        " yes",
        " two blue shapes",
        "",
    ]


def test_a_system_prompt_is_optional(vicuna):
    sample = encode_conversation([Turn("system", "describe the picture."), *QA], vicuna)
    said = "describe the picture. USER: <image>\nis there a red circle? ASSISTANT: yes</s>"
    assert sample.tokens == whole(vicuna, said)
    n = sample.roles.count("system")
    assert sample.roles[:n] == ["system"] * n and vicuna.decode([sample.tokens[:n]]) == ["describe the picture."]
    assert sample.labels[:n] == [IGNORED] * n


def test_chatml_is_the_string_that_qwen_was_trained_on(chatml):
    said = (
        "<|im_start|>system\ndescribe the picture.<|im_end|>\n<|im_start|>user\n<image>\nis there a red circle?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nhow many blue shapes are there?<|im_end|>\n"
        "<|im_start|>assistant\ntwo blue shapes<|im_end|>"
    )
    sample = encode_conversation([Turn("system", "describe the picture."), *FOUR], chatml)
    assert sample.tokens == whole(chatml, said)
    assert (
        chatml.tokenizer.decode(learnt(sample), skip_special_tokens=False) == "yes<|im_end|>two blue shapes<|im_end|>"
    )


def test_plain_has_no_names(plain):
    sample = encode_conversation(FOUR, plain)
    start, end, image = plain.start_token, plain.end_token, plain.image_token_id
    first, second = plain.ids("is there a red circle?"), plain.ids("how many blue shapes are there?")
    yes, two = plain.ids("yes"), plain.ids("two blue shapes")
    assert sample.tokens == [start, *[image] * PLACES, *first, *yes, end, *second, *two, end]
    assert learnt(sample) == [*yes, end, *two, end]
    assert [r for r, t in zip(sample.roles, sample.tokens, strict=True) if t == end] == ["assistant"] * 2


def test_a_label_is_the_token_it_stands_beside(plain, vicuna, chatml):
    for processor in (plain, vicuna, chatml):
        sample = encode_conversation(FOUR, processor)
        pairs = list(zip(sample.tokens, sample.labels, sample.roles, strict=True))
        assert all((label == token) == (role == "assistant") for token, label, role in pairs)
        assert all(label in (token, IGNORED) for token, label, _ in pairs)


def test_training_and_prompt_begin_alike(plain, vicuna, chatml):
    for processor in (plain, vicuna, chatml):
        sample = encode_conversation(FOUR, processor)
        for turns in (FOUR[:1], FOUR[:3]):
            prompt = encode_conversation(turns, processor, prompt=True)
            assert sample.tokens[: len(prompt.tokens)] == prompt.tokens
            assert sample.roles[len(prompt.tokens)] == "assistant"


def test_where_the_line_ends_makes_no_difference_to_our_own_tokeniser(plain):
    assert with_images("is it?", 2) == "<image>\n<image>\nis it?"
    assert plain.ids(with_images("is it?")) == plain.ids("<image> is it?")


def test_the_name_of_a_missing_end_token_is_told(chatml):
    processor = Processor(chatml.tokenizer, replace(chatml.config, chat="vicuna"))
    with pytest.raises(UserError, match=r"no token for the end of an answer \(</s>\)"):
        encode_conversation(QA, processor)
    assert encode_conversation(QA[:1], processor, prompt=True).tokens  # which needs none


def test_a_template_falls_back_on_the_tokenisers_own_end(plain):
    processor = Processor(plain.tokenizer, replace(plain.config, chat="vicuna"))
    assert encode_conversation(QA, processor).tokens[-1] == plain.end_token


def test_an_answer_ends_with_the_models_own_end_where_neither_template_nor_tokeniser_has_one(chatml, tmp_path):
    """GPT-2, Pythia and LLaMA as they are published: no chat template, and nothing is put behind a text."""
    end = chatml.tokenizer.token_to_id("<|endoftext|>")
    sizes = {"vocab_size": chatml.vocab_size, "context": 64, "width": 8, "depth": 1, "heads": 2}
    config = LanguageModelConfig(**sizes, end_tokens=(10**6, end))
    base = language.read_processor(tmp_path, config, chatml.tokenizer)
    assert base.end_token is None and encode_conversation(QA, base).tokens[-1] == end
    eyes = Processor(None, ProcessorConfig(image_size=32))
    assert encode_conversation(QA, with_chat(join_processors(eyes, base), "vicuna")).tokens[-1] == end


# ----------------------------------------------------------------------------------------------------------- what is cut


def test_text_is_cut_and_pictures_are_not(plain):
    turns = [*QA, Turn("user", "<image> how many blue shapes are there?"), Turn("assistant", "two")]
    full = encode_conversation(turns, plain)
    n = len(full.tokens)
    for context in range(n - 8, n + 1):
        sample = encode_conversation(turns, plain, context=context)
        assert len(sample.tokens) == len(sample.labels) == len(sample.roles) == context
        assert sample.tokens.count(plain.image_token_id) == 2 * PLACES
        assert sample.cut == n - context
        words = [t for t in sample.tokens if t != plain.image_token_id]
        assert words == [t for t in full.tokens if t != plain.image_token_id][: len(words)]
    assert encode_conversation(turns, plain, context=n) == full and full.cut == 0


def test_no_answer_in_the_context_is_an_error(plain):
    length = len(encode_conversation(QA, plain).tokens)
    prompt = len(encode_conversation(QA[:1], plain, prompt=True).tokens)
    assert len(learnt(encode_conversation(QA, plain, context=prompt + 1))) == 1
    for context in (prompt, 3):
        with pytest.raises(UserError, match=rf"has {length} tokens, 5 of them for images, .* context of {context}:"):
            encode_conversation(QA, plain, context=context)


def test_a_prompt_beyond_the_context_names_both_numbers(plain):
    n = len(encode_conversation(QA[:1], plain, prompt=True).tokens)
    assert len(encode_conversation(QA[:1], plain, prompt=True, context=n).tokens) == n
    with pytest.raises(UserError, match=f"the prompt has {n} tokens, but the context has room for {n - 1}"):
        encode_conversation(QA[:1], plain, prompt=True, context=n - 1)


# -------------------------------------------------------------------------------------------------------- what goes wrong

USER, ANSWER = Turn("user", "is it?"), Turn("assistant", "yes")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([ANSWER, USER, ANSWER], "starts with the assistant"),
        ([Turn("system", "s"), ANSWER], "starts with the assistant"),
        ([USER, Turn("gpt", "yes")], "turn 2 has the unknown role 'gpt': a role is one of system, user, assistant"),
        ([USER, USER, ANSWER], "turns 1 and 2 are both the user's"),
        ([USER, ANSWER, ANSWER], "turns 2 and 3 are both the assistant's"),
        ([USER, Turn("assistant", " \n")], "turn 2, the assistant's, is empty"),
        ([USER, ANSWER, Turn("system", "s"), USER, ANSWER], "turn 3 is the system's, which can only stand"),
        (
            [USER, Turn("assistant", "an <image>")],
            "turn 2 has an <image> placeholder, but only the user's turns come with images",
        ),
        ([USER], "nothing to learn in this conversation"),
        ([], "nothing to learn in this conversation"),
    ],
)
def test_a_broken_conversation_is_refused(plain, turns, message):
    with pytest.raises(UserError, match=message):
        encode_conversation(turns, plain)


def test_a_prompt_ends_with_the_user(plain):
    for turns in ([USER, ANSWER], [Turn("system", "s")], []):
        with pytest.raises(UserError, match="the user has the last word of a prompt"):
            encode_conversation(turns, plain, prompt=True)


@pytest.mark.parametrize(("marks", "images"), [(2, 1), (0, 1), (1, 0), (1, 3)])
def test_marks_and_images_that_differ_in_number_name_both(plain, marks, images):
    turns = [Turn("user", with_images("is it?", marks)), ANSWER]
    check_conversation(turns)  # nobody knows of images
    check_conversation(turns, marks)
    with pytest.raises(
        UserError,
        match=f"<image> placeholders in the conversation is {marks}, but that of its images is {images}",
    ):
        encode_conversation(turns, plain, images=images)


# ------------------------------------------------------------------------------------------------------ batch and picture


def test_a_batch_is_padded_on_the_right():
    batch = collate([Sample([5, 6, 7], [IGNORED, 6, 7], []), Sample([8], [8], [])], 9)
    assert batch["tokens"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64


def test_published_flamingos_are_asked_in_their_own_words():
    asked, shown = "what is it?", with_images("what is it?", 2)
    assert "".join(TEMPLATES["idefics"].user_turn(shown)) == "User:<image><image>what is it?\nAssistant:"
    assert "".join(TEMPLATES["idefics"].user_turn(asked)) == "User:what is it?\nAssistant:"
    instructed = TEMPLATES["idefics-instruct"]
    assert "".join(instructed.user_turn(shown)) == "User:<image><image>what is it?<end_of_utterance>\nAssistant:"
    theirs = TEMPLATES["openflamingo"]
    assert "".join(theirs.user_turn(with_images(asked))) == "<image>Question:what is it? Short answer:"
    assert "".join(theirs.user_turn(with_images(theirs.describe))) == "<image>Output:"


def test_a_mark_inside_a_question_stays_where_it_is():
    assert (
        "".join(TEMPLATES["idefics"].user_turn("<image>is it in <image>?"))
        == "User:<image>is it in <image>?\nAssistant:"
    )
    assert "".join(TEMPLATES["plain"].user_turn("<image>\nwhat is it?")) == "<image>\nwhat is it?"


def test_an_answer_ends_with_its_template_as_well(plain, chatml):
    assert endings(plain, (7,)) == {"end_tokens": (7,), "stop": ()}
    own = chatml.tokenizer.token_to_id("<|im_end|>")
    assert endings(chatml, (0,))["end_tokens"] == (0, own)
    assert endings(chatml, (own,))["end_tokens"] == (own,)
    base = Processor(plain.tokenizer, replace(plain.config, chat="idefics"))
    assert endings(base, ())["stop"] == ("\nUser:",)
