import itertools

import pytest
import torch

from minivlm.errors import UserError
from minivlm.generation import Options, generate, stream
from minivlm.generation.loop import generate_tokens, trim
from minivlm.generation.rules import contain_stop
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from tests.talkers import MASK, PROMPT, Recurrent, Script, V, answer, letters


class TestOptions:
    @pytest.mark.parametrize(
        ("wrong", "sentence"),
        [
            ({"temperature": -0.1}, "temperature is -0.1, but must be 0"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"temperature": float("inf")}, "temperature is inf"),
            ({"top_k": 0}, "top_k is 0, but must be at least 1"),
            ({"top_p": 0}, "top_p is 0, but must be above 0 and at most 1"),
            ({"top_p": 2}, "top_p is 2, but must be above 0 and at most 1"),
            ({"num_beams": 0}, "num_beams is 0, but must be at least 1"),
            ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, but must be above 0"),
            ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0, but must be above 0"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
            (
                {"num_beams": 2, "temperature": 0.5},
                "beam search does not sample: set num_beams to 1 or temperature to 0",
            ),
            ({"stop": ("x", "")}, "A stop string is empty"),
        ],
    )
    def test_a_value_without_sense_is_told_in_a_sentence(self, wrong, sentence):
        with pytest.raises(UserError, match=sentence):
            Options(**wrong)

    def test_the_ends_of_the_ranges_are_fine(self):
        Options(max_new_tokens=1, temperature=0, top_k=1, top_p=1.0, repetition_penalty=0.1, num_beams=1)
        Options(num_beams=2, top_p=1e-9)

    def test_one_string_is_not_a_sequence_of_stop_strings(self):
        with pytest.raises(TypeError, match=r"as in stop=\('USER',\)"):
            Options(stop="USER")

    def test_too_little_room(self):
        with pytest.raises(ValueError, match="max_new_tokens is 9, but the decoding has room for 8"):
            answer([1], model={"room": 8}, max_new_tokens=9)
        assert answer([1], model={"room": 9}, max_new_tokens=9).shape == (1, 9)

    def test_stop_strings_need_words(self):
        for way in (generate, stream):
            with pytest.raises(ValueError, match=r"give decode, as processor\.decode"):
                way(Recurrent([1]), Options(stop=("x",)))

    def test_a_prompt_of_other_rows(self):
        with pytest.raises(ValueError, match=r"prompt has shape \(4, 3\), but the decoding has 2 rows"):
            answer([1, 2], prompt=PROMPT, repetition_penalty=2.0)

    def test_beam_search_cannot_be_streamed(self):
        with pytest.raises(UserError, match="cannot be streamed: set num_beams to 1"):
            stream(Recurrent([1]), Options(num_beams=2))


class TestGreedy:
    def test_is_the_likeliest_token_each_time(self):
        model, expected = Recurrent([1, 2]), []
        for _ in range(12):
            expected.append(model.logits.argmax(-1))
            model.step(expected[-1])
        tokens = answer([1, 2], max_new_tokens=12)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, torch.stack(expected, dim=1))

    def test_hears_each_token_but_the_last(self):
        model = Recurrent([1, 2])
        tokens = generate(model, Options(max_new_tokens=5))
        assert model.calls == [("step", column.tolist()) for column in tokens[:, :4].T]

    def test_bfloat16(self):
        model = Recurrent([1, 2])
        model.words, model.mix, model.out, model.state, model.logits = (
            x.bfloat16() for x in (model.words, model.mix, model.out, model.state, model.logits)
        )
        first = model.logits.argmax(-1)
        assert torch.equal(generate(model, Options(max_new_tokens=3))[:, 0], first)

    def test_any_of_several_end_tokens_ends_a_row_and_padding_follows(self):
        model = Script([[1, 7, 2, 2, 2], [1, 1, 1, 8, 2], [1, 2, 8, 2, 2]])
        tokens = generate(model, Options(max_new_tokens=9, end_tokens=(7, 8), pad_token=5))
        assert tokens.tolist() == [[1, 7, 5, 5], [1, 1, 1, 8], [1, 2, 8, 5]]
        assert model.heard == [[1, 1, 1], [7, 1, 2], [5, 1, 8]]

    def test_padding_may_be_the_end_token(self):
        model = Script([[7, 1, 1], [1, 7, 1]])
        assert generate(model, Options(end_tokens=(7,), pad_token=7)).tolist() == [[7, 7], [1, 7]]

    def test_no_end_token(self):
        assert generate(Script([[7, 1]]), Options(max_new_tokens=3)).tolist() == [[7, 1, 1]]

    def test_one_can_train_on_the_answers(self):
        """Tensors of inference mode could not be saved for the backward pass."""
        words = torch.nn.Embedding(V, 3)
        streamed = next(stream(Recurrent([1]), Options()))
        for tokens in (answer([1], max_new_tokens=3), answer([1], max_new_tokens=3, num_beams=2), streamed):
            words(tokens).sum().backward()
            tokens[..., 0] = 2

    def test_keeps_no_graph(self):
        model = Recurrent([1])
        model.mix.requires_grad_()
        generate(model, Options(max_new_tokens=2))
        assert not model.logits.requires_grad


class TestLookingRarely:
    """On a GPU the loop asks only every 8th token whether all rows have ended: the answers must not tell."""

    @pytest.mark.parametrize("n", [1, 3, 8, 9, 20])
    def test_same_answers(self, n):
        options = Options(max_new_tokens=n, end_tokens=(2, 5), pad_token=7, repetition_penalty=1.2)
        plain = generate(Recurrent([1, 2, 3]), options)
        rare = torch.stack(list(generate_tokens(Recurrent([1, 2, 3]), options, None, None, None, every=8)), dim=1)
        assert torch.equal(trim(rare, options.end_tokens), plain)

    def test_looks_at_the_eighth(self):
        model = Script([[7, 1]])
        assert len(list(generate_tokens(model, Options(end_tokens=(7,)), None, None, None, every=8))) == 8
        assert len(model.heard) == 7

    def test_trim(self):
        tokens = torch.tensor([[1, 7, 0, 0, 0], [1, 1, 8, 0, 0]])
        assert trim(tokens, (7, 8)).tolist() == [[1, 7, 0], [1, 1, 8]]
        assert trim(tokens, (8,)).tolist() == tokens.tolist()
        assert trim(tokens, ()).tolist() == tokens.tolist()


class TestRowsAreIndependent:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"repetition_penalty": 1.7},
            {"temperature": 1.0},
            {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.3},
            {"num_beams": 3},
            {"num_beams": 4, "length_penalty": 2.0, "repetition_penalty": 1.3},
            {"num_beams": 2, "length_penalty": -1.0},
        ],
        ids=str,
    )
    def test_a_row_gets_what_it_would_get_alone(self, options):
        starts, options = [5, 2, 6, 7], {"max_new_tokens": 14, "end_tokens": (1, 4, 6), "pad_token": 3, **options}
        together = answer(starts, prompt=PROMPT, mask=MASK, seed=[11, 12, 13, 14], **options)
        for i, start in enumerate(starts):
            n = int(MASK[i].sum())  # without padding
            alone = answer([start], prompt=PROMPT[i : i + 1, :n], seed=11 + i, **options)[0]
            assert together[i, : len(alone)].tolist() == alone.tolist()
            assert (together[i, len(alone) :] == 3).all()

    def test_stop_strings(self):
        options = {"max_new_tokens": 14, "stop": ("fa", "hd", "hhh"), "pad_token": 3, "decode": letters}
        together, lengths = answer([5, 2, 6, 7], **options), set()
        for row, start in zip(together, [5, 2, 6, 7], strict=True):
            alone = answer([start], **options)[0]
            assert row[: len(alone)].tolist() == alone.tolist()
            assert (row[len(alone) :] == 3).all()
            lengths.add(len(alone))
        assert len(lengths) > 1


class TestSuppressedTokens:
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.95}, {"num_beams": 3}], ids=str)
    def test_are_never_said_and_leave_the_rest_as_if_they_were_not_there(self, options):
        class Without(Recurrent):
            """To which these tokens never come to mind."""

            def read(self, tokens):
                super().read(tokens)
                self.logits[:, [0, 3, 8]] = -torch.inf

        starts, options = [5, 2, 6, 7], {"max_new_tokens": 14, "seed": 4, **options}
        free = answer(starts, **options)
        said = answer(starts, suppress_tokens=(0, 3, 8), **options)
        assert torch.isin(free, torch.tensor([0, 3, 8])).any() and not torch.isin(said, torch.tensor([0, 3, 8])).any()
        if options.get("num_beams", 1) == 1:  # a beam's log p still counts what was suppressed
            assert torch.equal(said, generate(Without(starts), Options(**options)))


class TestStopStrings:
    def test_a_row_ends_with_the_token_that_completes_one(self):
        model = Script([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
        tokens = generate(model, Options(max_new_tokens=5, stop=("bc", "a"), pad_token=8), decode=letters)
        assert tokens.tolist() == [[0, 8, 8, 8, 8], [4, 3, 2, 1, 0]]

    def test_longer_than_a_token(self):
        tokens = generate(Script([[0, 1, 2, 3, 4]]), Options(stop=("bcd",)), decode=letters)
        assert tokens.tolist() == [[0, 1, 2, 3]]

    def test_beside_end_tokens(self):
        model = Script([[0, 1, 2], [5, 7, 2]])
        tokens = generate(model, Options(end_tokens=(7,), stop=("b",)), decode=letters)
        assert tokens.tolist() == [[0, 1], [5, 7]]

    def test_the_prompt_does_not_count(self):
        tokens = generate(Script([[0, 1]]), Options(stop=("c",), max_new_tokens=2), prompt=PROMPT[:1], decode=letters)
        assert tokens.tolist() == [[0, 1]]

    def test_contain_stop(self):
        assert contain_stop(torch.tensor([[0, 1], [1, 2]]), ("bc", "x"), letters).tolist() == [False, True]

    def test_a_beam_ends_with_one(self):
        """Beam search with a stop string of one token is beam search with that end token."""
        for start in range(8):
            stopped = answer([start], num_beams=3, max_new_tokens=10, stop=("d",), decode=letters)
            ended = answer([start], num_beams=3, max_new_tokens=10, end_tokens=(3,))
            assert torch.equal(stopped, ended)


class TestStream:
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 2.0}], ids=str)
    def test_is_generate_column_by_column(self, options):
        options = Options(max_new_tokens=15, end_tokens=(2, 5), pad_token=7, **options)
        columns = list(stream(Recurrent([1, 2, 3]), options, prompt=PROMPT[:3], prompt_mask=MASK[:3]))
        assert all(c.shape == (3,) for c in columns)
        whole = generate(Recurrent([1, 2, 3]), options, prompt=PROMPT[:3], prompt_mask=MASK[:3])
        assert torch.equal(torch.stack(columns, dim=1), whole)

    def test_a_token_comes_before_the_next_is_computed(self):
        model = Recurrent([1])
        tokens = stream(model, Options())
        for steps in range(4):
            next(tokens)
            assert len(model.calls) == steps

    def test_stop_strings(self):
        assert len(list(stream(Script([[0, 1, 2]]), Options(stop=("bc",)), decode=letters))) == 3

    def test_gradients_are_as_before_between_two_tokens(self):
        for _ in stream(Recurrent([1]), Options(max_new_tokens=2)):
            assert torch.is_grad_enabled()


@pytest.fixture(scope="module")
def model():
    config = LanguageModelConfig(
        width=16, depth=2, heads=2, vocab_size=V, context=32, end_tokens=(1, 6), pad_token=3, tie_head=False
    )
    model = LanguageModel(config).eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


class TestLanguageModel:
    """The engine and a real decoding together."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"repetition_penalty": 1.5},
            {"temperature": 1.0, "top_p": 0.9, "seed": [4, 5, 6, 7]},
            {"num_beams": 3, "length_penalty": 0.5},
        ],
        ids=str,
    )
    def test_a_row_gets_what_it_would_get_alone(self, model, options):
        together = model.generate(PROMPT, MASK, max_new_tokens=10, **options)
        for i, row in enumerate(together):
            own = {**options, **({"seed": [options["seed"][i]]} if "seed" in options else {})}
            alone = model.generate(PROMPT[i : i + 1, : int(MASK[i].sum())], max_new_tokens=10, **own)[0]
            assert row[: len(alone)].tolist() == alone.tolist()
            assert (row[len(alone) :] == 3).all()

    def test_greedy_is_the_argmax_of_the_full_forward(self, model):
        tokens = model.generate(PROMPT[:1], max_new_tokens=10, end_tokens=())
        logits = model(torch.cat([PROMPT[:1], tokens], dim=1)).logits
        assert torch.equal(logits[:, 2:-1].argmax(-1), tokens)

    def test_beam_search_carries_each_beam_s_past_along(self, model):
        """With as many beams as sequences, the answer is the likeliest of all by the model's own full forward."""
        tokens = model.generate(PROMPT[:1], max_new_tokens=3, end_tokens=(), num_beams=V**3)
        every = torch.tensor(list(itertools.product(range(V), repeat=3)))
        with torch.no_grad():
            logits = model(torch.cat([PROMPT[:1].expand(len(every), 3), every], dim=1)).logits
        log_p = logits[:, 2:-1].log_softmax(-1).gather(2, every[..., None]).sum((1, 2))
        assert tokens[0].tolist() == every[log_p.argmax()].tolist()

    def test_stream(self, model):
        columns = list(model.stream(PROMPT, MASK, max_new_tokens=10))
        assert torch.equal(torch.stack(columns, dim=1), model.generate(PROMPT, MASK, max_new_tokens=10))
