"""The decoder-only language model: GPT-2, GPT-NeoX, OPT, LLaMA, Qwen2 and our own small ones are configurations of it.

    tokens (B, T) ─ embedding ─→ (B, T, D) ─ + positions ─→ blocks ─→ norm ─→ head ─→ logits (B, T, V)
                                     ▲
                     models with images give embeddings in place of tokens

Radford et al. 2019 (GPT-2): learned positions, LayerNorm. Touvron et al. 2023 (LLaMA): rotary, RMSNorm, gated MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minivlm.generation import Decoding
from minivlm.layers.initialise import initialise_linears, normal
from minivlm.layers.packed_decoding import PackedDecoder, PackedWeights, in_blocks
from minivlm.layers.padding import padding_last
from minivlm.layers.position import Cache
from minivlm.layers.transformer import Between, Transformer, TransformerConfig, make_norm
from minivlm.layers.vocabulary import TokenEmbedding
from minivlm.losses import next_token_loss
from minivlm.model import Model


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(TransformerConfig):
    """The defaults are GPT-2's; LLaMA's: rope_theta, rmsnorm, gated_mlp, no biases, positions "none"."""

    vocab_size: int
    context: int = 1024  # tokens of a text at most
    causal: bool = True
    positions: Literal["learned", "none"] = "learned"  # added to the embeddings; rotary ones are rope_theta
    position_offset: int = 0  # rows of the table before that of position 0; OPT has two
    embedding_width: int | None = None  # where embeddings and head are narrower than the blocks (OPT-350m)
    final_norm: bool = True
    tie_head: bool = True  # the head is the embedding (Press & Wolf 2017)
    end_tokens: tuple[int, ...] = ()  # any of these ends an answer
    pad_token: int = 0


class LMOutput:
    """hidden (B, T, E): last hidden states; logits (B, T, V), computed when they are first used; loss: scalar or None."""

    def __init__(self, hidden: Tensor, head: nn.Module, loss: Tensor | None = None):
        self.hidden, self.head, self.loss = hidden, head, loss

    @cached_property
    def logits(self) -> Tensor:
        return self.head(self.hidden)


class LanguageModel(Model):
    """tokens (B, T), mask (B, T) with True = a real token → `LMOutput`. labels (B, T): the tokens, −100 = not counted.

    embeddings (B, T, D), as `embed` makes them, may be given in place of tokens. Padding belongs on the right.
    where: see `next_token_loss`; between: see `Transformer`.
    """

    config_class = LanguageModelConfig
    abilities = frozenset({"answer", "chat", "complete"})
    takes_images = False

    def __init__(self, config: LanguageModelConfig, *, seed: int = 0):
        super().__init__(config)
        c = config
        E = c.embedding_width or c.width
        self.token_embedding = TokenEmbedding(c.vocab_size, E)
        learned = c.positions == "learned"
        self.position_embedding = nn.Embedding(c.position_offset + c.context, c.width) if learned else None
        self.project_in = nn.Linear(E, c.width, bias=False) if c.width != E else None
        self.project_out = nn.Linear(c.width, E, bias=False) if c.width != E else None
        self.dropout = nn.Dropout(c.dropout)
        self.transformer = Transformer(c)
        self.norm = make_norm(c) if c.final_norm else None
        self.head = nn.Linear(E, c.vocab_size, bias=False)
        if c.tie_head:
            self.head.weight = self.token_embedding.weight
        self.packing = PackedWeights(PackedDecoder)
        initialise(self, torch.Generator().manual_seed(seed))

    def forward(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        where: Tensor | None = None,
        between: Between | None = None,
    ) -> LMOutput:
        x = self.embed(tokens) if embeddings is None else embeddings
        return self.output(self.states(x, mask, between=between), labels, where)

    def output(self, hidden: Tensor, labels: Tensor | None = None, where: Tensor | None = None) -> LMOutput:
        """Last hidden states (B, T, E) → their logits, and the loss of the labels (B, T), if there are some."""
        loss = None if labels is None else next_token_loss(hidden, labels, self.head.weight, where=where)
        return LMOutput(hidden, self.head, loss)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) → (B, T, D): token embeddings, without positions."""
        x = self.token_embedding(tokens)
        return x if self.project_in is None else self.project_in(x)

    def states(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
        between: Between | None = None,
    ) -> Tensor:
        """Embeddings (B, T, D) → last hidden states (B, T, E), which the head takes. With a cache, x continues what it holds.

        between: see `Transformer`.
        """
        T, context = x.shape[1], self.config.context
        if cache is None and context < T:
            raise ValueError(f"texts have {T} tokens, but the context is {context}; cut them first")
        if torch.is_grad_enabled():
            self.packing.clear()  # the weights are about to change
        positions = cache.next_positions(T) if cache is not None else positions_of(mask, x)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions + self.config.position_offset)
        x = self.transformer(self.dropout(x), mask=mask, positions=positions, cache=cache, between=between)
        x = x if self.norm is None else self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def losses(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The training losses. Padding on the right needs no mask: causal attention does not reach it."""
        return {"next token": self(tokens, labels=labels).loss}

    # ---- generation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        room: int,
        static: bool = False,
        between: CrossAttendingLayers | None = None,
    ) -> LMDecoding:
        """Process a prompt (B, T) → a decoding with room for `room` more tokens a row. ValueError if the context is too short.

        static: all steps have the same shapes, as torch.compile wants them (see `Cache`). between: see `Transformer`, for the
        prompt with all its padding on the right.
        """
        x = self.embed(tokens) if embeddings is None else embeddings
        mask = None if mask is None or mask.all() else mask
        if mask is not None:
            x, mask = padding_last(x, mask)
        if x.shape[1] + room > self.config.context:
            raise ValueError(
                f"a prompt of {x.shape[1]} tokens and {room} new ones do not fit the context of {self.config.context}"
            )
        cache = self.transformer.new_cache(len(x), x.shape[1] + room)
        if mask is not None and not mask.any(dim=1).all():
            raise ValueError("a row of the prompt has no token at all; start with one, such as a start token")
        hidden = self.states(x, mask, cache=cache, between=between)
        rows = torch.arange(len(x), device=x.device)
        hidden = (
            hidden[:, -1] if mask is None else hidden[rows, mask.sum(dim=1) - 1]
        )  # (B, E), of each row's last token
        cache.static = static  # of the steps; the prompt is processed once
        after = None if between is None else between.after(cache.lengths)
        return LMDecoding(self, cache, self.head(hidden).float(), room=room, between=after)

    @property
    def endings(self) -> dict[str, Any]:
        return {"end_tokens": self.config.end_tokens, "pad_token": self.config.pad_token}


class CrossAttendingLayers(Protocol):
    """Layers between the blocks that attend to something beside the text, as `Transformer` calls them (its `between`)."""

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """The input of block `index`, made from x (B, T, D)."""

    def after(self, lengths: Tensor) -> CrossAttendingLayers:
        """The layers for tokens that follow a prompt of so many tokens a row, lengths (B,)."""

    def reorder(self, rows: Tensor) -> CrossAttendingLayers:
        """The layers where row i continues as row rows[i] did."""


class LMDecoding(Decoding):
    """A language model that generates. room: tokens that may still be appended."""

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache,
        logits: Tensor,
        *,
        room: int,
        between: CrossAttendingLayers | None = None,
    ):
        self.model, self.cache, self.logits, self.room, self.between = model, cache, logits, room, between
        self.packed: PackedDecoder | None = None
        self.steps = 0

    def step(self, tokens: Tensor) -> None:
        if self.steps == 0:  # not before the first token is out: copying the weights takes as long as some steps
            self.packed = self.model.packing.of(self.model, self.cache.keys.dtype)
        super().step(tokens)
        self.steps += 1

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (B,) → logits (B, V) of what follows."""
        if self.packed is not None:
            return self.packed(tokens, self.cache, self.between).float()
        hidden = self.model.states(self.model.embed(tokens[:, None]), cache=self.cache, between=self.between)
        return self.model.head(hidden[:, 0]).float()

    def compile(self, **options) -> None:
        """Run every further step through torch.compile; its shapes stay the same after a `prefill` with static=True."""
        if in_blocks(self.cache.keys.device, self.cache.keys.dtype):  # which the compiler does not support
            self.packed, self.steps = None, max(1, self.steps)
        self.predict = torch.compile(self.predict, fullgraph=True, dynamic=False, **options)

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.cache.reorder(rows)
        self.between = None if self.between is None else self.between.reorder(rows)


def check_decoder(language: Any, who: str) -> None:
    """ValueError for a language model that is more than a decoder."""
    if not isinstance(language, LanguageModelConfig):
        raise ValueError(
            f"{who} needs a decoder as its language model, which continues what precedes; a {type(language).__name__} has an "
            "encoder as well, which BLIP-2 can use"
        )


def positions_of(mask: Tensor | None, x: Tensor) -> Tensor:
    """(T,); or (B, T) where a mask (B, T) has padding to be skipped."""
    if mask is None:
        return torch.arange(x.shape[1], device=x.device)
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


@torch.no_grad()
def initialise(model: LanguageModel, generator: torch.Generator) -> None:
    """GPT-2's scales for the embeddings (0.02 for tokens, 0.01 for positions); the rest as `initialise_linears` says."""
    initialise_linears(model, generator)
    normal(model.token_embedding.weight, 0.02, generator)  # the tied head as well
    if model.position_embedding is not None:
        normal(model.position_embedding.weight, 0.01, generator)
    if not model.config.tie_head:
        normal(model.head.weight, 0.02, generator)
