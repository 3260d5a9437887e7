"""Contrast and matching of images and texts, as BLIP and stage 1 of BLIP-2 learn them.

    vectors ─ every image finds its text among all, and the reverse ──→ contrast
                                   │ wrong pairs that are similar: hard negatives
    images and texts ──────────────┴─ does the text describe the image? ──→ matching

Functions of a model (`scale`, `probabilities`, `backward_in_parts`) become methods of those that have a `logit_scale`.
Li et al. 2021, "Align before Fuse" (ALBEF), §3.2; Li et al. 2022, "BLIP", §3.2; Li et al. 2023, "BLIP-2", §3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minivlm.layers.tower import ImageFeatures
from minivlm.losses import backward, first_row, full_precision, gather, in_parts, is_distributed, mean
from minivlm.model import Batch, Model


def similarity(image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
    """(B, D), (B', D), unit length → their cosines (B, B'). Of images with several vectors, (B, Q, D), the best counts."""
    with full_precision(image_vectors.device):
        cosines = image_vectors.float() @ text_vectors.float().T
    return cosines if cosines.dim() == 2 else cosines.amax(dim=1)  # (B, Q, B') → (B, B')


def scale(model: Model) -> Tensor | float:
    """1 / temperature; 1 without a `logit_scale`. In training the parameter is clamped, as CLIP's was, to 100 at most."""
    if model.logit_scale is None:
        return 1.0
    if model.training:
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
    return model.logit_scale.exp()


def probabilities(model: Model, image_vectors: Tensor, text_vectors: Tensor) -> Tensor:
    """(N, E) or (N, Q, E), (M, E) → (N, M): how probable each text is for each image, among the M texts."""
    return (scale(model) * similarity(image_vectors, text_vectors)).softmax(dim=1)


def backward_in_parts(model: Model, batch: Batch, size: int) -> dict[str, Tensor]:
    """See `Model.backward_in_parts`. Images and texts are compared in the whole batch, so `forward` cuts it itself."""
    model.check_parts(len(batch["tokens"]), size)
    return backward(model.losses(**batch, micro_batch=size))


def contrast(
    image_vectors: Tensor, text_vectors: Tensor, scale: Callable[[], Tensor | float], *, smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The contrastive loss (ITC), and the logits of texts for each image and of images for each text, (B, W·B) each.

    scale(): 1 / temperature. smoothing: this share of every label is spread over all W·B.
    """
    to_texts = scale() * similarity(image_vectors, gather(text_vectors))
    to_images = scale() * similarity(gather(image_vectors), text_vectors).T
    own = first_row(len(to_texts)) + torch.arange(len(to_texts), device=to_texts.device)
    loss = sum(F.cross_entropy(logits, own, label_smoothing=smoothing) for logits in (to_texts, to_images)) / 2
    return loss, to_texts.detach(), to_images.detach()


def matching(
    match: Callable[[ImageFeatures, Tensor, Tensor], Tensor],
    features: Tensor,
    tokens: Tensor,
    mask: Tensor,
    to_texts: Tensor,
    to_images: Tensor,
    false: tuple[Tensor, Tensor] | None = None,
    *,
    draw: bool,
    micro_batch: int | None = None,
) -> Tensor:
    """The matching loss (ITM): yes to every pair, no to every image with a hard negative text and every text with a hard
    negative image.

    match: the model's, → logits (·, 2). to_texts, to_images: the logits of `contrast`. A row without any other text counts
    less. false: tokens and mask (B, F) of wrong texts that replace those found in the batch, where there are some
    (Yuksekgonul et al. 2023, §4, NegCLIP: negatives that differ in one word). draw: see `hard_negatives`. micro_batch:
    pairs at a time.
    """
    B, all_features = len(tokens), gather(features)
    all_tokens, all_mask = gather_texts(tokens, mask)
    same = same_texts(tokens, mask, all_tokens, all_mask)  # (B, W·B); true negatives are elsewhere
    other_text, found = hard_negatives(to_texts, same, draw=draw)
    other_image, found_image = hard_negatives(to_images, same, draw=draw)
    wrong = all_tokens[other_text], all_mask[other_text]
    if false is not None:
        given = false[1].any(dim=1)
        found = found | given
        wrong = [torch.where(given[:, None], a, b) for a, b in zip(*widen(false, wrong), strict=True)]
    texts, masks = zip(*widen((tokens, mask), wrong), strict=True)

    images = torch.cat([features, features, all_features[other_image]])
    texts, masks = torch.cat([*texts, texts[0]]), torch.cat([*masks, masks[0]])
    logits = in_parts(match, ImageFeatures(images), texts, masks, size=micro_batch)  # (3B, 2)
    truth = (torch.arange(3 * B, device=logits.device) < B).long()
    counts = torch.cat([torch.ones_like(found), found, found_image]).float()
    return mean((F.cross_entropy(logits.float(), truth, reduction="none") * counts).sum(), counts.sum())


def chance_losses(batch_size: int) -> dict[str, float]:
    """The losses of a model that knows nothing but that one pair in three is right."""
    guess = math.log(3) - 2 / 3 * math.log(2) if batch_size > 1 else 0.0
    return {"contrast": math.log(batch_size), "matching": guess}


def hard_negatives(logits: Tensor, same: Tensor, *, draw: bool = True) -> tuple[Tensor, Tensor]:
    """logits (B, C), same (B, C) with True = right as well → one wrong column for every row, and whether there is one (B,).

    draw: by chance, likelier the better it fits (ALBEF, §3.2), for training; otherwise the one that fits best, so that
    losses in eval mode are the same every time. Where there is none the column is any.
    """
    found = ~same.all(dim=1)
    wrong = logits.float().masked_fill(same & found[:, None], -torch.inf)
    return wrong.softmax(dim=1).multinomial(1)[:, 0] if draw else wrong.argmax(dim=1), found


def same_texts(tokens: Tensor, mask: Tensor, all_tokens: Tensor, all_mask: Tensor) -> Tensor:
    """(B, T), (C, T') with T' ≥ T → (B, C): True where two texts have the same tokens. A text is the same as itself."""
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
