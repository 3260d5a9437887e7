"""A frozen vision tower sees the same in every epoch, so it looks at every training picture once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor

from minivlm.models.vision_features import measure
from minivlm.tasks.features import inference
from minivlm.training import autocast

CACHE_LIMIT = 4 * 2**30  # bytes of features that may be kept
AT_A_TIME = 250  # pictures
MEASURED = 1000  # pictures that tell how large features are


def compute_features_once(
    model, processor, n: int, pictures: Callable[[Sequence[int]], Sequence], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """(n, N, C) on the CPU: what `model.image_features` sees of each of n pictures; None where that is more than CACHE_LIMIT.

    pictures: indices → a picture for each.
    """
    from tqdm import tqdm

    features = None
    with inference(model), autocast(device, dtype):
        for i in tqdm(range(0, n, AT_A_TIME), desc="image features", unit=" batches", leave=False):
            indices = range(i, min(i + AT_A_TIME, n))
            seen = model.image_features(processor.images(list(pictures(indices))).to(device))  # (b · views, N, C)
            seen = seen.reshape(len(indices), -1, seen.shape[-1]).to("cpu", dtype)
            if features is None:
                if n * seen[0].nbytes > CACHE_LIMIT:
                    return None
                features = torch.empty(n, *seen.shape[1:], dtype=dtype)
            features[i : i + AT_A_TIME] = seen
    return features


def measure_once(model, processor, pictures: Iterable, device: torch.device, dtype: torch.dtype) -> None:
    """Where the model is to standardise what its tower sees, and has not seen anything yet: it measures the first of the
    pictures."""
    standardise = getattr(model, "standardise", None)
    if standardise is not None and not standardise.measured and (first := list(islice(pictures, MEASURED))):
        with inference(model), autocast(device, dtype):
            measure(model, processor.images(first).to(device))
