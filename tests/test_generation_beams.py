import itertools

import pytest
import torch

from minivlm.generation import Options, generate
from minivlm.generation.beam_search import beam_search
from tests.talkers import Recurrent, answer


def log_probabilities(start, sequences, **model):
    """log p of each token of each sequence, (S, T)"""
    network, log_p = Recurrent([start] * len(sequences), **model), []
    for column in sequences.T:
        log_p.append(network.logits.log_softmax(-1).gather(1, column[:, None]).squeeze(1))
        network.read(column)
    return torch.stack(log_p, dim=1)


def best_of_all(start, V, T, ends, length_penalty, **model):
    """The best answer among all V^T, by counting them up."""
    every = torch.tensor(list(itertools.product(range(V), repeat=T)))
    log_p = log_probabilities(start, every, V=V, **model)
    ended = torch.isin(every, torch.tensor(ends)).int()
    length = (ended.cumsum(1) - ended == 0).sum(1)  # tokens up to the first end
    inside = torch.arange(T) < length[:, None]
    value = (log_p * inside).sum(1) / length**length_penalty
    best = int(value.argmax())
    return every[best, : length[best]].tolist()


class Table:
    """Says two words: the first by one row of probabilities, the second by the row of the first."""

    def __init__(self, first, second):
        self.room, self.logits, self.second = 2, torch.tensor([first]).log(), second

    def reorder(self, rows):
        self.logits = self.logits[rows]

    def step(self, tokens):
        self.logits = torch.tensor([self.second[i] for i in tokens.tolist()]).log()


class TestBeamSearch:
    @pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
    @pytest.mark.parametrize("ends", [(2,), (0, 3)], ids=str)
    def test_as_many_beams_as_sequences_find_the_best_of_all(self, length_penalty, ends):
        found, greedy = [], []
        for start in range(6):
            model = {"V": 4, "seed": start + 10, "sharpness": 0.5}
            options = {"max_new_tokens": 4, "end_tokens": ends, "length_penalty": length_penalty, "model": model}
            best = best_of_all(start, T=4, ends=ends, length_penalty=length_penalty, **model)
            found.append(answer([start], num_beams=4**4, **options)[0].tolist())
            greedy.append(answer([start], **options)[0].tolist())
            assert found[-1] == best
        assert found != greedy  # or the search would not be needed

    def test_two_beams_by_hand(self):
        """Greedy takes 0 (0.6) and then has only weak words; 1 (0.4) is followed by one sure word."""
        table = [[0.6, 0.4, 0.0], {0: [0.4, 0.3, 0.3], 1: [0.05, 0.05, 0.9]}]
        assert generate(Table(*table), Options(max_new_tokens=2)).tolist() == [[0, 0]]
        assert generate(Table(*table), Options(max_new_tokens=2, num_beams=2)).tolist() == [[1, 2]]

    def test_beams_that_end_leave_no_beam_unused(self):
        """The four likeliest words are three ends and one that goes on; the second beam is the fifth."""
        table = Table([0.3, 0.2, 0.15, 0.25, 0.1], {3: [0.2] * 5, 4: [1.0, 0, 0, 0, 0]})
        options = Options(max_new_tokens=2, num_beams=2, end_tokens=(0, 1, 2), length_penalty=2.0)
        assert generate(table, options).tolist() == [[4, 0]]

    def test_reorders_before_it_steps_and_not_after_the_last_token(self):
        model = Recurrent([1, 2])
        generate(model, Options(max_new_tokens=4, num_beams=3))
        kinds = [kind for kind, _ in model.calls]
        assert kinds == ["reorder", "reorder", "step", "reorder", "step", "reorder", "step"]
        assert model.calls[0] == ("reorder", [0, 0, 0, 1, 1, 1])
        for _, rows in model.calls[1::2]:
            assert all(row // 3 == i // 3 for i, row in enumerate(rows))  # no beam leaves its sample

    def test_more_beams_than_words(self):
        assert answer([1], num_beams=50, max_new_tokens=3).shape == (1, 3)

    def test_more_beams_are_no_worse(self):
        """With length penalty 0 on answers of one length: not true of every network, but of these."""
        for start in range(5):
            scores = [
                float(log_probabilities(start, answer([start], num_beams=n, max_new_tokens=6)).sum())
                for n in (1, 4, 300)
            ]
            assert scores[0] <= scores[1] <= scores[2]

    def test_stops_when_nothing_better_can_come(self):
        """Ends are likely here, so that far fewer steps than max_new_tokens are taken."""
        model = Recurrent([1, 2], V=3, sharpness=1.0)
        generate(model, Options(max_new_tokens=60, num_beams=2, end_tokens=(0, 1), length_penalty=0.0))
        assert sum(kind == "step" for kind, _ in model.calls) < 20

    def test_padding_after_the_end_and_none_after_the_longest(self):
        tokens = answer([5, 2, 6, 7], num_beams=3, max_new_tokens=14, end_tokens=(1, 4, 6), pad_token=77)
        lengths = [(row != 77).sum().item() for row in tokens]
        assert len(set(lengths)) > 1
        assert max(lengths) == tokens.shape[1]
        for row, n in zip(tokens, lengths, strict=True):
            assert (row[n:] == 77).all()
            assert n == 14 or row[n - 1] in (1, 4, 6)

    def test_looking_rarely_changes_nothing(self):
        for seed in range(5):
            options, models = Options(max_new_tokens=20, num_beams=3, end_tokens=(1, 4)), []
            for _ in range(2):
                models.append(Recurrent([1, 2], seed=seed, room=20))
            results = [beam_search(m, options, None, None, None, look) for m, look in zip(models, (1, 8), strict=True)]
            assert torch.equal(*results)
            assert all(m.room >= 1 for m in models)  # the last token is not appended
