"""Stage 1 of BLIP-2: a Q-Former learns what in a picture can be told in words. The vision tower is frozen.

    images ─→ vision tower ─→ queries ─┬─ one by one with the text's vector ─→ contrast     unimodal mask
                                       ├─ together with the text's words    ─→ matching     bidirectional mask
                                       └─ in front of the text              ─→ generation   causal mask

Li et al. 2023, "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models",
§3.1 and figure 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minivlm import generation
from minivlm.layers.initialise import initialise_linears
from minivlm.layers.mlp import ACTIVATIONS
from minivlm.layers.qformer import QFormerConfig, QFormerOutput
from minivlm.layers.transformer import make_norm
from minivlm.losses import full_precision, gather, is_distributed, next_token_loss
from minivlm.models.querying import QueryingConfig, QueryingModel


@dataclass(frozen=True, kw_only=True)
class BLIP2Stage1Config(QueryingConfig):
    embed_width: int = 256
    temperature: float | None = 0.07  # of the contrast, where it starts; None: cosines as they are, nothing to learn
    text_head: bool = True  # it can say what it sees; published weights of stage 1 cannot
    start_token: int  # before every text …
    decode_token: int  # … and in its place where the text is to be said
    end_token: int
    pad_token: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.qformer.vocab_size is None:
            raise ValueError("stage 1 compares pictures with texts: the Q-Former needs a vocab_size")


@dataclass(frozen=True)
class BLIP2Stage1Output:
    logits_per_image: Tensor  # (B, B'): row i scores every text for image i
    losses: dict[str, Tensor]  # by name; none if images and texts are not pairs
    image_features: Tensor  # (B, Q, E), unit length
    text_features: Tensor  # (B', E), unit length


class TextHead(nn.Module):
    """BERT's: hidden (B, T, D) → what the embedding is multiplied with to give logits.  Devlin et al. 2019, §3.1."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = make_norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(hidden)))


class BLIP2Stage1(QueryingModel):
    """images (B, 3, H, W), tokens (B, T) that begin with the start token, mask (B, T) → `BLIP2Stage1Output`.

    Wherever it takes images, `features` (B, N, C) may be given in their place: what `look` gives, for those who have it.
    """

    config_class = BLIP2Stage1Config

    def __init__(self, config: BLIP2Stage1Config, *, seed: int = 0):
        super().__init__(config, seed=seed)
        c = config
        self.vision_projection = nn.Linear(c.qformer.width, c.embed_width)
        self.text_projection = nn.Linear(c.qformer.width, c.embed_width)
        self.match_head = nn.Linear(c.qformer.width, 2)
        learnt = c.temperature is not None
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(c.temperature))) if learnt else None
        self.text_head = TextHead(c.qformer) if c.text_head else None
        generator = torch.Generator().manual_seed(seed)
        for part in (self.vision_projection, self.text_projection, self.match_head, self.text_head):
            if part is not None:
                initialise_linears(part, generator)

    def forward(
        self, images: Tensor | None, tokens: Tensor, mask: Tensor | None = None, *, features: Tensor | None = None
    ) -> BLIP2Stage1Output:
        features = self.look(images) if features is None else features
        image_vectors, text_vectors = self.encode_image(features=features), self.encode_text(tokens, mask)
        logits = self.scale() * self.similarity(image_vectors, text_vectors)
        losses = self.losses(tokens, mask, features=features) if len(tokens) == len(features) else {}
        return BLIP2Stage1Output(logits, losses, image_vectors, text_vectors)

    def encode_image(self, images: Tensor | None = None, *, features: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) → (B, Q, E): a vector for each query, unit length."""
        return F.normalize(self.vision_projection(self.query(images, features).queries), dim=-1)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T) → (B, E), unit length: read at the start token."""
        text = self.qformer(None, tokens, mask, see="unimodal").text
        return F.normalize(self.text_projection(text[:, 0]), dim=-1)

    def match(
        self, images: Tensor | None, tokens: Tensor, mask: Tensor | None = None, *, features: Tensor | None = None
    ) -> Tensor:
        """Does text i tell what picture i shows?  → logits (B, 2) of no and yes, the mean of what all queries say."""
        features = self.look(images) if features is None else features
        return self.match_head(self.qformer(features, tokens, mask, see="bidirectional").queries).mean(dim=1)

    @staticmethod
    def similarity(image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
        """(B, Q, E), (B', E) → (B, B'): the cosine of each text and the query that fits it best."""
        with full_precision(image_vectors.device):
            return (image_vectors.float() @ text_vectors.float().T).amax(dim=1)  # (B, Q, B') → (B, B')

    def scale(self) -> Tensor | float:
        """1 / temperature, at most 100 as in CLIP."""
        return 1.0 if self.logit_scale is None else self.logit_scale.exp().clamp(max=100.0)

    # ---- its three losses ----------------------------------------------------------------------------------------------

    def losses(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        images: Tensor | None = None,
        features: Tensor | None = None,
        false: Tensor | None = None,
        false_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What training adds up. Text i belongs to picture i. Under torchrun the others are those of all processes.

        false, false_mask (B, F): texts that are nearly right, to be told from the right ones; all masked: there is none.
        """
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        features = self.look(images) if features is None else features
        seen = self.query(None, features)
        image_vectors = F.normalize(self.vision_projection(seen.queries), dim=-1)
        contrast, to_texts, to_images = self.contrast(image_vectors, self.encode_text(tokens, mask))
        nearly = None if false is None else (false, false_mask)
        matching = self.matching(features, tokens, mask, to_texts, to_images, nearly)
        losses = {"contrast": contrast, "matching": matching}
        if self.text_head is not None:
            labels = tokens.masked_fill(~mask, -100)
            hidden = self.text_head(self.qformer.tell(self.to_be_said(tokens), mask, after=seen).text)
            losses["generation"] = next_token_loss(hidden, labels, self.qformer.token_embedding.weight)
        return losses

    def contrast(self, image_vectors: Tensor, text_vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every picture finds its text among all, and the reverse (§3.1, ITC) → loss, and both sets of logits (B, W·B)."""
        to_texts = self.scale() * self.similarity(image_vectors, gather(text_vectors))
        to_images = self.scale() * self.similarity(gather(image_vectors), text_vectors).T
        own = first_row(len(to_texts)) + torch.arange(len(to_texts), device=to_texts.device)
        loss = (F.cross_entropy(to_texts, own) + F.cross_entropy(to_images, own)) / 2
        return loss, to_texts.detach(), to_images.detach()

    def matching(
        self,
        features: Tensor,
        tokens: Tensor,
        mask: Tensor,
        to_texts: Tensor,
        to_images: Tensor,
        false: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Yes to every pair; no to every picture with a wrong text, and every text with a wrong picture, that look alike.

        §3.1, ITM, with the hard negatives of Li et al. 2021 (ALBEF), §3.2. A row without any other text counts less.
        false: tokens and mask (B, F) of wrong texts that take the place of those found in the batch, where there are some
        (Yuksekgonul et al. 2023, §4, NegCLIP: negatives that differ in one word).
        """
        B, all_features = len(tokens), gather(features)
        all_tokens, all_mask = gather_texts(tokens, mask)
        same = same_texts(tokens, mask, all_tokens, all_mask)  # (B, W·B); true negatives are elsewhere
        other_text, found = hard_negatives(to_texts, same)
        other_image, found_image = hard_negatives(to_images, same)
        wrong = all_tokens[other_text], all_mask[other_text]
        if false is not None:
            given = false[1].any(dim=1)
            found = found | given
            wrong = [torch.where(given[:, None], a, b) for a, b in zip(*widen(false, wrong), strict=True)]
        texts, masks = zip(*widen((tokens, mask), wrong), strict=True)

        pictures = torch.cat([features, features, all_features[other_image]])
        texts, masks = torch.cat([*texts, texts[0]]), torch.cat([*masks, masks[0]])
        logits = self.match(None, texts, masks, features=pictures)  # (3B, 2)
        truth = (torch.arange(3 * B, device=logits.device) < B).long()
        counts = torch.cat([torch.ones_like(found), found, found_image]).float()
        return (F.cross_entropy(logits.float(), truth, reduction="none") * counts).sum() / counts.sum()

    def to_be_said(self, tokens: Tensor) -> Tensor:
        """The start token becomes the one that asks for the text."""
        return tokens.masked_fill(tokens == self.config.start_token, self.config.decode_token)

    def chance_losses(self, batch_size: int) -> dict[str, float]:
        """The losses of a model that knows nothing but that one pair in three is right, and how many words there are."""
        guess = math.log(3) - 2 / 3 * math.log(2) if batch_size > 1 else 0.0
        losses = {"contrast": math.log(batch_size), "matching": guess}
        if self.text_head is not None:
            losses["generation"] = math.log(self.config.qformer.vocab_size)
        return losses

    # ---- speaking ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(
        self,
        images: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        room: int,
        features: Tensor | None = None,
    ) -> Stage1Decoding:
        """Look at pictures, read the beginnings (B, T) of their captions, and be ready for `room` more tokens a row."""
        if self.text_head is None:
            raise ValueError("this stage 1 has no text_head, so it can compare and match, but not speak")
        if (T := tokens.shape[1]) + room > (context := self.config.qformer.context):
            raise ValueError(f"a beginning of {T} tokens and {room} new ones do not fit the context of {context}")
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        order = mask.long().argsort(dim=1, stable=True)  # padding to the left, so that all rows go on together
        tokens, mask = tokens.gather(1, order), mask.gather(1, order)
        return Stage1Decoding(self, self.to_be_said(tokens), mask, self.query(images, features), room=room)

    def options(self, **given) -> generation.Options:
        """What is not given is as the config says."""
        known = generation.Options(end_tokens=(self.config.end_token,), pad_token=self.config.pad_token)
        return replace(known, **given)


class Stage1Decoding:
    """Stage 1 in the middle of a caption (see `generation.Decoding`): what queries and words keep is all it needs."""

    def __init__(self, model: BLIP2Stage1, tokens: Tensor, mask: Tensor, seen: QFormerOutput, *, room: int):
        self.model, self.mask, self.seen, self.room = model, mask, seen, room
        self.logits = self.predict(tokens)

    @torch.no_grad()
    def predict(self, tokens: Tensor) -> Tensor:
        """tokens (B, T), the last that `mask` counts → logits (B, V) of what follows."""
        self.seen = self.model.qformer.tell(tokens, self.mask, after=self.seen)
        hidden = self.model.text_head(self.seen.text[:, -1])
        return (hidden @ self.model.qformer.token_embedding.weight.T).float()

    def step(self, tokens: Tensor) -> None:
        if self.room < 1:
            raise ValueError("there is no room for another token; begin with more")
        self.mask = F.pad(self.mask, (0, 1), value=True)
        self.logits, self.room = self.predict(tokens[:, None]), self.room - 1

    def reorder(self, rows: Tensor) -> None:
        self.mask, self.logits = self.mask[rows], self.logits[rows]
        self.seen = replace(self.seen, kept=[(k[rows], v[rows]) for k, v in self.seen.kept])


def hard_negatives(logits: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """logits (B, C), same (B, C) with True = right as well → for every row one wrong column, likelier the better it fits.

    The second tensor (B,) says where there is one; elsewhere the column is any.
    """
    found = ~same.all(dim=1)
    weights = logits.float().masked_fill(same & found[:, None], -torch.inf).softmax(dim=1)
    return weights.multinomial(1)[:, 0], found


def same_texts(tokens: Tensor, mask: Tensor, all_tokens: Tensor, all_mask: Tensor) -> Tensor:
    """(B, T), (C, T') with T' ≥ T → (B, C): True where two texts are the same words. A text is always the same as itself."""
    tokens = F.pad(tokens.masked_fill(~mask, -1), (0, all_tokens.shape[1] - tokens.shape[1]), value=-1)
    return (tokens[:, None] == all_tokens.masked_fill(~all_mask, -1)).all(dim=-1)


def widen(*texts: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tokens and masks (·, T) of several batches → the same, padded to the longest of them."""
    T = max(tokens.shape[1] for tokens, _ in texts)
    return [(F.pad(tokens, (0, T - tokens.shape[1])), F.pad(mask, (0, T - mask.shape[1]))) for tokens, mask in texts]


def gather_texts(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(b, T) of this process → (W·b, T') of all, padded to the longest."""
    if not is_distributed():
        return tokens, mask
    longest = torch.tensor(tokens.shape[1], device=tokens.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    beyond = (0, int(longest) - tokens.shape[1])
    return gather(F.pad(tokens, beyond)), gather(F.pad(mask, beyond).long()).bool()


def first_row(rows: int) -> int:
    """Where the rows of this process begin among those of all."""
    return dist.get_rank() * rows if is_distributed() else 0
