"""What may be said: rules that look at what stands before, one by one, and that beams take along."""

import json
import warnings

import pytest
import torch

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.generation.options import Options, with_defaults
from minivlm.generation.rules import Rules
from minivlm.layers import T5, LanguageModel, T5Config
from minivlm.pretrained import generation_config
from tests.languages import LLAMA
from tests.talkers import MASK, PROMPT, V, answer


def forbidden(said=(), i=None, prompt=PROMPT, mask=MASK, **options):
    """For each row the tokens that the rules leave no hope, after the columns of `said`."""
    scores = torch.ones(4, V)
    rules = Rules(Options(**options), prompt, mask, scores)
    for column in said:
        rules.append(torch.tensor(column))
    return [row.nonzero().flatten().tolist() for row in rules(scores, len(said) if i is None else i).isinf()]


def test_no_token_twice():
    assert forbidden(no_repeat_ngram_size=1) == [[3, 4, 5], [1, 2], [6], [7, 8]]
    assert forbidden([[0, 0, 1, 1]], no_repeat_ngram_size=1) == [[0, 3, 4, 5], [0, 1, 2], [1, 6], [1, 7, 8]]


def test_no_pair_twice():
    assert forbidden(no_repeat_ngram_size=2) == [[], [], [], []]  # 8 8 7: nothing has followed 7 yet
    assert forbidden([[3, 1, 6, 8]], no_repeat_ngram_size=2) == [[4], [2], [6], [7, 8]]


def test_no_three_twice_where_rows_are_of_different_lengths():
    said = [[3, 1, 6, 8], [4, 2, 6, 8]]
    assert forbidden(said, no_repeat_ngram_size=3) == [[5], [1], [6], [7]]
    assert forbidden(no_repeat_ngram_size=8) == [[]] * 4


def test_bad_words_but_not_the_end_alone():
    assert forbidden(bad_words_ids=[[3], [2], [4, 5, 6], [8, 7, 1]], end_tokens=(2,)) == [[3, 6], [3], [3], [1, 3]]
    assert forbidden(prompt=None, mask=None, bad_words_ids=[[5, 6]]) == [[]] * 4


def test_no_end_too_early():
    assert forbidden(min_new_tokens=1, end_tokens=(0, 2)) == [[0, 2]] * 4
    assert forbidden(i=1, min_new_tokens=1, end_tokens=(0, 2)) == [[]] * 4
    assert forbidden(min_length=3, end_tokens=(2,)) == [[], [2], [2], []]  # each row counts its own prompt
    assert forbidden(min_length=2, end_tokens=(2,), prompt=None, mask=None) == [[2]] * 4  # and a start token


def test_what_an_answer_begins_with():
    assert forbidden(begin_suppress_tokens=[3], suppress_tokens=[5]) == [[3, 5]] * 4
    assert forbidden(i=1, begin_suppress_tokens=[3], suppress_tokens=[5]) == [[5]] * 4
    others = [token for token in range(V) if token != 4]
    assert forbidden(forced_bos_token_id=4) == [[], [], others, []]  # row 2 has a single token
    assert forbidden(i=1, forced_bos_token_id=4, begin_suppress_tokens=[3]) == [[], [], [3], []]


def test_what_an_answer_ends_with():
    others = [token for token in range(V) if token not in (4, 6)]
    options = {"max_new_tokens": 5, "forced_eos_token_id": [4, 6]}
    assert forbidden(i=3, **options) == [[]] * 4 and forbidden(i=4, **options) == [others] * 4


@pytest.mark.parametrize("n", [1, 2])
def test_beams_take_what_was_said_along(n):
    """If a beam that changes its place kept another's words, it would say something twice, or not what it may."""
    for start in range(6):
        said = answer([start], num_beams=4, max_new_tokens=8, no_repeat_ngram_size=n, model={"sharpness": 2.0})[0]
        grams = [tuple(said[i : i + n].tolist()) for i in range(len(said) - n + 1)]
        assert len(set(grams)) == len(grams)


def test_beams_are_penalised_for_their_own_words():
    """Every answer's log p, counted anew along it with the penalty, is what the search believed: so no other is better."""
    for start in range(4):
        options = {"max_new_tokens": 3, "repetition_penalty": 3.0, "model": {"V": 4, "seed": start}}
        wide = answer([start], num_beams=64, **options)[0].tolist()
        assert wide == best_with_penalty(start, 3.0, V=4, seed=start)


def best_with_penalty(start, penalty, **model):
    import itertools

    from tests.talkers import Recurrent

    def value(sequence):
        network, seen, total = Recurrent([start], **model), set(), 0.0
        for token in sequence:
            log_p = network.logits.log_softmax(-1)[0, token].item()
            total += log_p * (penalty if token in seen else 1.0)
            seen.add(token)
            network.read(torch.tensor([token]))
        return total

    return list(max(itertools.product(range(model["V"]), repeat=3), key=value))


def test_min_p_leaves_what_is_likely_enough():
    options = {"temperature": 1.0, "model": {"sharpness": 0.0}, "max_new_tokens": 1}
    even = answer([1] * 300, min_p=1.0, seed=list(range(300)), **options)
    assert set(even.flatten().tolist()) == set(range(V))  # all are as likely as the likeliest
    sharp = {**options, "model": {"sharpness": 5.0}}
    assert torch.equal(answer([1, 2], min_p=1.0, **sharp), answer([1, 2], **{**sharp, "temperature": 0.0}))


def test_a_value_without_sense_is_told_in_a_sentence():
    for wrong, sentence in (
        ({"min_p": 1.5}, "min_p is 1.5, but must be from 0 to 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"bad_words_ids": [[1], []]}, "One of bad_words_ids is empty"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
    ):
        with pytest.raises(UserError, match=sentence):
            Options(**wrong)


# ---- generation_config.json --------------------------------------------------------------------------------------------


def published(directory, model=None, **values):
    """The model in a published directory with this generation_config.json."""
    save(directory, model or LanguageModel(LLAMA), layout="hf")
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return load(directory)[0]


def test_the_file_says_what_holds_and_the_caller_goes_before_it(tmp_path):
    model = published(tmp_path, repetition_penalty=1.3, num_beams=3, max_new_tokens=5, min_length=None)
    assert model.defaults == {"repetition_penalty": 1.3, "num_beams": 3, "max_new_tokens": 5}
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(
        model.generate(tokens),
        LanguageModel.generate(model, tokens, repetition_penalty=1.3, num_beams=3, max_new_tokens=5),
    )
    assert model.generate(tokens, max_new_tokens=2).shape[1] == 2
    assert model.options(num_beams=1, repetition_penalty=1.0).num_beams == 1
    assert model.options(temperature=0.5).num_beams == 1  # who samples has no beams
    assert len(list(model.stream(tokens))) == 5


@pytest.mark.parametrize("layout", ["hf", "minivlm"])
def test_there_and_back(layout, tmp_path):
    values = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "suppress_tokens": [3], "min_length": 2}
    model = published(tmp_path / "a", **values)
    assert model.defaults == {
        k: tuple(v) if k == "suppress_tokens" else v for k, v in values.items() if k != "do_sample"
    }
    save(tmp_path / "b", model, layout=layout)
    assert load(tmp_path / "b")[0].defaults == model.defaults
    beams = published(tmp_path / "c", num_beams=2, early_stopping=True)
    save(tmp_path / "d", beams, layout=layout)
    assert load(tmp_path / "d")[0].defaults == {"num_beams": 2, "early_stopping": True}


def test_a_file_that_samples_has_the_standard_values_where_it_is_silent(tmp_path):
    assert published(tmp_path, do_sample=True).defaults == {"temperature": 1.0, "top_k": 50}
    assert published(tmp_path, do_sample=True, top_k=0, temperature=0.5).defaults == {"temperature": 0.5}
    assert published(tmp_path, do_sample=False, temperature=0.5, top_p=0.9).defaults == {"top_p": 0.9}


def test_a_length_of_prompt_and_answer(tmp_path):
    model = published(tmp_path, max_length=7)
    assert model.generate(torch.tensor([[3, 4, 5]])).shape[1] == 4
    assert model.generate(torch.tensor([[3] * 9])).shape[1] == 1
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6).shape[1] == 6


def test_where_an_answer_begins_goes_before_the_config(tmp_path):
    t5 = T5(T5Config(vocab_size=30, width=16, depth=1, heads=2, end_tokens=(1,)))
    model = published(tmp_path, t5, decoder_start_token_id=7, no_repeat_ngram_size=1)
    assert model.config.start_token == 7
    assert 7 not in model.generate(torch.tensor([[3, 4]]), max_new_tokens=20)  # it was heard, and is no word to repeat


def test_files_of_old_say_it_in_config_json(tmp_path):
    save(tmp_path, LanguageModel(LLAMA), layout="hf")
    (tmp_path / "generation_config.json").unlink()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 4, "no_repeat_ngram_size": 3}))
    assert load(tmp_path)[0].defaults == {"num_beams": 4, "no_repeat_ngram_size": 3}


def test_what_is_not_followed_is_told_in_one_line(tmp_path):
    off = {"penalty_alpha": 0.0, "guidance_scale": 1.0, "typical_p": 1, "num_beam_groups": 1, "constraints": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        published(tmp_path, **off, transformers_version="4.46.0", bos_token_id=1, use_cache=True)
    with pytest.warns(UserWarning, match=r"asks for penalty_alpha, new_way, which is not followed\.$"):
        published(tmp_path, penalty_alpha=0.6, new_way=True)
    with pytest.warns(UserWarning, match=r"asks for do_sample beside num_beams"):
        published(tmp_path, do_sample=True, num_beams=2)


@pytest.mark.parametrize("wrong", [{"repetition_penalty": "high"}, {"num_beams": 0}, {"bad_words_ids": [[]]}])
def test_values_without_sense_name_the_file(wrong, tmp_path):
    with pytest.raises(UserError, match=rf"generation_config\.json: .*{next(iter(wrong))}"):
        published(tmp_path, **wrong)


def test_what_contradicts_what_is_given_does_not_hold():
    assert with_defaults({"num_beams": 2}, {"temperature": 0.7, "top_k": 5}) == {"num_beams": 2, "top_k": 5}
    assert with_defaults({"temperature": 0.0}, {"num_beams": 3}) == {"temperature": 0.0, "num_beams": 3}


def test_every_field_is_known_once():
    kinds = (generation_config.FOLLOWED, generation_config.SAMPLING, generation_config.OFF)
    names = [*generation_config.TOKENS, *generation_config.WITHOUT_EFFECT, *(name for kind in kinds for name in kind)]
    assert len(names) == len(set(names)) == len(generation_config.FIELDS)
