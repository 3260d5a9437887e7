"""The precisions of a model's tensors: one for all while it is used, two while it learns.

loaded           all in the one in which most were stored, or in the one that was asked for
trained          what learns in fp32: a step of 2e-5 is less than half a unit in the last place of most bf16 weights
                 (Micikevicius et al. 2018, "Mixed Precision Training", §3.1). What is frozen and was stored in half
                 precision, in what autocast computes its products in: the same numbers, half the memory
validated, left  in the precision in which it came
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)


def dtype_called(name: Any) -> torch.dtype | None:
    """ "float16" or "torch.float16" → torch.float16; None for what is no name of a floating type."""
    return next((dtype for dtype in FLOATS if isinstance(name, str) and name.split(".")[-1] == str(dtype)[6:]), None)


def main_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The floating type that most numbers have; None where no tensor has any."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return max(counts, key=counts.get) if counts else None


def kept_in_fp32(model: nn.Module) -> set[int]:
    """ids of the parameters that float16 has too little room for: `fp32_in_fp16` of a class says how their names end."""
    parts = [(m, m.fp32_in_fp16) for m in model.modules() if hasattr(m, "fp32_in_fp16")]
    return {id(p) for m, suffix in parts for name, p in m.named_parameters() if name.endswith(suffix)}


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers with a fraction, each once."""
    return (t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point())


def hold_for_training(model: nn.Module, computing: torch.dtype) -> None:
    """Hold each tensor in the precision that the drawing above gives it, in place.

    `model.stored` becomes the precision to validate and to save it in.

    computing: of autocast; fp32: there is none, and all is held in fp32.
    """
    model.stored = getattr(model, "stored", None) or main_dtype(model.parameters())
    frozen = frozen_products(model) if computing in HALF and model.stored in HALF else set()
    for tensor in tensors_of(model):
        if tensor.dtype in HALF or id(tensor) in frozen:
            tensor.data = tensor.data.to(computing if id(tensor) in frozen else torch.float32)


def frozen_products(model: nn.Module) -> set[int]:
    """ids of the weights that do not learn, and that nothing but matrix products reads."""
    readers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    learning = {id(p) for m in model.modules() if getattr(m, "follows", False) for p in m.parameters()}
    others = {id(p) for m in model.modules() if m not in readers for p in m.parameters(recurse=False)}
    return {id(m.weight) for m in readers if not m.weight.requires_grad} - learning - others


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """All in dtype, in place, but for what it has too little room for."""
    kept = kept_in_fp32(model) if dtype == torch.float16 else ()
    for tensor in tensors_of(model):
        if tensor.dtype != (wanted := torch.float32 if id(tensor) in kept else dtype):
            tensor.data = tensor.data.to(wanted)
    forget_packings(model)


def forget_packings(model: nn.Module) -> None:
    """Drop the second copies of weights that models generate with (see `minivlm.layers.packed_decoding`)."""
    for module in model.modules():
        if (packing := getattr(module, "packing", None)) is not None:
            packing.clear()


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in the precision in which it will be left: validated so, it is as good as it is said to be."""
    held = [(tensor, tensor.data) for tensor in tensors_of(model)]
    cast(model, model.stored)
    try:
        yield
    finally:
        for tensor, data in held:
            if tensor.dtype != data.dtype:
                tensor.data = data
        forget_packings(model)
