"""What attends to what: the attention weights of any model, recorded while it runs as it always does.

    with record_attention(model) as maps:
        model(images, tokens, mask)
    maps["transformer.blocks.3.attention"]      → [(B, H, T, S), …], one tensor for each time that it ran

No forward pass knows about it: every `Attention` asks its `backend` for the sum, and here that is a function which keeps
the weights and gives what the reference gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from minivlm.layers.attention import Attention, attend_reference, attention_weights


@contextmanager
def record_attention(model: nn.Module, only: Callable[[str], bool] = lambda name: True) -> Iterator[dict[str, list]]:
    """A dict that fills while the block runs: name of an `Attention` inside `model` → its weights (B, H, T, S), detached.

    only: which of the names are recorded. The weights of rows that may attend to nothing are zero.
    """
    maps: dict[str, list[Tensor]] = {}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, Attention) and only(name)}
    backends = {name: module.backend for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.backend = recorder(maps.setdefault(name, []))
        yield maps
    finally:
        for name, module in modules.items():
            module.backend = backends[name]


def recorder(kept: list[Tensor]) -> Callable[..., Tensor]:
    """A backend of `attend` that appends the weights to `kept`."""

    def attend_and_keep(q, k, v, *, dropout: float = 0.0, **options) -> Tensor:
        kept.append(attention_weights(q.detach(), k.detach(), **options))
        return attend_reference(q, k, v, dropout=dropout, **options)

    return attend_and_keep
