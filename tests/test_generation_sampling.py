import pytest
import torch

from minivlm.generation import Options, generate
from minivlm.generation.loop import draw, sample
from minivlm.generation.rules import Rules, penalise
from tests.talkers import MASK, PROMPT, Recurrent, Script, V, answer


class TestSampling:
    def test_the_same_seed_gives_the_same_sample(self):
        first, again, other = (answer([1, 2], temperature=1.0, max_new_tokens=30, seed=s) for s in (5, 5, 6))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_does_not_touch_the_random_state_of_others(self):
        before = torch.random.get_rng_state()
        answer([1, 2], temperature=1.0)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_longer_answer_begins_with_the_shorter(self):
        short, long = (answer([1, 2], temperature=1.0, max_new_tokens=n, seed=3) for n in (7, 40))
        assert torch.equal(long[:, :7], short)

    def test_no_row_has_the_numbers_of_another(self):
        """Not even row 1 of one seed those of row 0 of the next, as seed + row would have it."""
        numbers = torch.cat([draw(seed, 64, 3) for seed in range(64)])
        assert len(numbers.unique(dim=0)) == 64 * 64

    def test_a_number_is_the_seed_of_the_first_row(self):
        for seed in (0, 7, -3, 2**40 + 1):
            assert torch.equal(draw(seed, 2, 5)[:1], draw([seed], 1, 5))

    def test_numbers_are_never_zero(self, monkeypatch):
        """Torch's may be: such a row would take the first token of the vocabulary, however unlikely."""
        numbers = draw(0, 1, 1_000_000)
        assert numbers.shape == (1, 1_000_000)
        assert 0 < numbers.min() < 1e-5
        assert 1 - 1e-5 < numbers.max() <= 1
        monkeypatch.setattr(torch, "rand", lambda n, generator: torch.zeros(n))
        assert (draw(0, 1, 3) == 1).all()

    def test_seeds_for_other_rows(self):
        with pytest.raises(ValueError, match="there are 3 seeds for 2 rows"):
            answer([1, 2], temperature=1.0, seed=[1, 2, 3])

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_frequencies_are_the_probabilities(self, temperature):
        """A grid of uniform numbers instead of random ones: each share is exact to one point of the grid."""
        n, logits = 10_000, torch.randn(V)
        uniform = torch.arange(1, n + 1) / n
        chosen = sample(logits.expand(n, V), uniform, Options(temperature=temperature))
        shares = chosen.bincount(minlength=V) / n
        assert (shares - (logits / temperature).softmax(-1)).abs().max() < 2 / n

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"top_k": 1}, [0, 1, 0, 0]),
            ({"top_k": 2}, [0, 5 / 8, 0, 3 / 8]),
            ({"top_k": 9}, [0.15, 0.5, 0.05, 0.3]),
            ({"top_p": 0.49}, [0, 1, 0, 0]),
            ({"top_p": 0.51}, [0, 5 / 8, 0, 3 / 8]),
            ({"top_p": 0.79}, [0, 5 / 8, 0, 3 / 8]),
            ({"top_p": 0.81}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
            ({"top_p": 1.0}, [0.15, 0.5, 0.05, 0.3]),
            ({"top_p": 1e-9}, [0, 1, 0, 0]),
            (
                {"top_k": 3, "top_p": 0.83},
                [0, 5 / 8, 0, 3 / 8],
            ),  # of the three's probability: 0.8 / 0.95 = 0.842 ≥ 0.83
            ({"top_k": 3, "top_p": 0.85}, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
        ],
        ids=str,
    )
    def test_filters(self, options, expected):
        n, logits = 10_000, torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
        uniform = torch.arange(1, n + 1) / n
        chosen = sample(logits.expand(n, 4), uniform, Options(temperature=1.0, **options))
        assert (chosen.bincount(minlength=4) / n - torch.tensor(expected)).abs().max() < 2 / n

    @pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 1.0}], ids=str)
    def test_what_is_impossible_is_never_said(self, options):
        logits = torch.full((3, V), -torch.inf)
        logits[:, 3], logits[:, 5] = 0.1, -0.3
        uniform = torch.tensor([2.0**-24, 0.5, 1.0])
        assert set(sample(logits, uniform, Options(temperature=1.0, **options)).tolist()) <= {3, 5}

    def test_cold_is_greedy(self):
        assert torch.equal(answer([1, 2], temperature=1e-39), answer([1, 2]))

    def test_one_candidate_is_greedy(self):
        assert torch.equal(answer([1, 2], temperature=5.0, top_k=1), answer([1, 2]))


class TestRepetitionPenalty:
    def test_by_hand(self):
        scores, seen = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[True, True, False, False]])
        assert penalise(scores, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0]]

    def test_the_prompt_counts_and_its_padding_does_not(self):
        def seen(*prompt):
            scores = torch.ones(4, V)
            marks = Rules(Options(repetition_penalty=2.0), *prompt, scores)(scores, 0) < 1
            return [row.nonzero().flatten().tolist() for row in marks]

        assert seen(PROMPT, MASK) == [[3, 4, 5], [1, 2], [6], [7, 8]]
        assert seen(PROMPT, None)[1] == [0, 1, 2]
        assert seen(None, None) == [[]] * 4

    def test_a_large_one_forbids_to_repeat(self):
        """log p is negative, so that beam search says each word once before any twice, those of the prompt last."""
        options = {"num_beams": 2, "max_new_tokens": 7, "repetition_penalty": 1e6, "model": {"sharpness": 0.1}}
        tokens = answer([1], prompt=torch.tensor([[3, 4, 0]]), mask=torch.tensor([[True, True, False]]), **options)
        assert sorted(tokens[0].tolist()) == [0, 1, 2, 5, 6, 7, 8]

    def test_greedy_with_a_prompt(self):
        """The first token is the likeliest after the logits of the prompt's were divided or multiplied."""
        for start in range(9):
            logits = Recurrent([start]).logits[0]
            for token in (3, 4):
                logits[token] = logits[token] / 3 if logits[token] > 0 else logits[token] * 3
            options = {"mask": torch.tensor([[True, True, False]]), "repetition_penalty": 3.0, "max_new_tokens": 1}
            assert answer([start], prompt=torch.tensor([[3, 4, 0]]), **options).item() == logits.argmax()

    def test_what_was_said_counts(self):
        """The script says 1 all the time, with a logit of 3 beside 2: after a penalty of 2, it is the least likely."""
        raised = type("Raised", (Script,), {"logits": property(lambda self: Script.logits.fget(self) + 2)})
        tokens = generate(raised([[1]], V=3), Options(max_new_tokens=3, repetition_penalty=2.0))
        assert tokens.tolist() == [[1, 0, 2]]
