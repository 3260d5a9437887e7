"""A model between two tokens: what every model that generates text hands to the loop in `generation/loop.py`."""

from __future__ import annotations

from torch import Tensor


class Decoding:
    """A model that has processed a prompt of B rows and keeps what it needs of it, such as keys and values.

    logits (B, V) float: for the token that comes next. room: how many tokens may still be appended. A subclass defines
    `predict`, and extends `reorder` by what it keeps.
    """

    logits: Tensor
    room: int

    def step(self, tokens: Tensor) -> None:
        """Append tokens (B,) int64; afterwards, logits are those of what follows. ValueError without room."""
        if self.room < 1:
            raise ValueError("there is no room for another token: give prefill a larger room")
        self.logits, self.room = self.predict(tokens), self.room - 1

    def predict(self, tokens: Tensor) -> Tensor:
        """Process tokens (B,) → logits (B, V) of what follows."""
        raise NotImplementedError

    def reorder(self, rows: Tensor) -> None:
        """Row i continues as row rows[i] did; rows (B',) int64 may be more or fewer than B."""
        self.logits = self.logits[rows]


def check_context(tokens: int, room: int, context: int) -> None:
    """ValueError if a prompt of so many tokens and `room` new ones do not fit the context."""
    if tokens + room > context:
        raise ValueError(f"a prompt of {tokens} tokens and {room} new ones do not fit the context of {context}")
