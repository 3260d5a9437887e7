"""A language model learns to know one more token."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn


def with_vocabulary(model: nn.Module, size: int) -> nn.Module:
    """A `LanguageModel` or `T5` that knows `size` tokens, or itself if it knows as many already.

    The rows of new tokens are the mean of the others: unlikely words rather than random ones.
    """
    if size <= model.config.vocab_size:
        return model
    grown = type(model)(replace(model.config, vocab_size=size))
    state = model.state_dict()
    for name in ("token_embedding.weight", "head.weight"):
        row = state[name].mean(dim=0, keepdim=True)
        state[name] = torch.cat([state[name], row.expand(size - len(state[name]), -1)])
    grown.load_state_dict(state)
    return grown
