"""Small things that speak, for tests of the engine that lets them."""

import torch

from minivlm.generation import Options, generate

V = 9
PROMPT = torch.tensor([[3, 4, 5], [1, 2, 0], [6, 0, 0], [8, 8, 7]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)


class Recurrent:
    """A tiny recurrent network in place of a model: what it expects depends on all that a row was told."""

    def __init__(self, starts, V=V, room=64, seed=0, sharpness=0.7):
        random = torch.Generator().manual_seed(seed)
        self.words, self.mix, self.out = (
            torch.randn(n, m, generator=random, dtype=torch.float64) for n, m in [(100, 8), (8, 8), (8, V)]
        )
        self.sharpness, self.room, self.calls = sharpness, room, []
        self.state = torch.zeros(len(starts), 8, dtype=torch.float64)
        self.read(torch.as_tensor(starts))

    def read(self, tokens):
        self.state = torch.tanh(self.state @ self.mix + self.words[tokens])
        self.logits = self.sharpness * self.state @ self.out

    def step(self, tokens):
        assert self.room > 0
        assert tokens.dtype == torch.int64 and tokens.shape == (len(self.state),)
        self.room -= 1
        self.calls.append(("step", tokens.tolist()))
        self.read(tokens)

    def reorder(self, rows):
        self.calls.append(("reorder", rows.tolist()))
        self.state, self.logits = self.state[rows], self.logits[rows]


class Script:
    """Says what it is told to, whatever it hears; the other tokens are equally likely among themselves."""

    def __init__(self, rows, V=V):
        self.rows, self.room, self.heard = torch.tensor(rows), 64, []
        self.V, self.at = V, 0

    @property
    def logits(self):
        return torch.nn.functional.one_hot(self.rows[:, min(self.at, self.rows.shape[1] - 1)], self.V).float()

    def step(self, tokens):
        self.heard.append(tokens.tolist())
        self.at += 1


def letters(rows):
    """0 is "a", 1 is "b", …"""
    return ["".join(chr(ord("a") + i) for i in row) for row in rows]


def answer(starts, decode=None, prompt=None, mask=None, model=None, **options):
    model = dict(model or {})
    return generate(Recurrent(starts, **model), Options(**options), prompt=prompt, prompt_mask=mask, decode=decode)
