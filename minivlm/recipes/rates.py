"""The learning rate of each part. Where --rates says nothing of it, what a part comes from does:

a model from scratch                     the recipe's rate, all of it
beside or in what is published           vision towers and CLIPs 1e-5, the rest 2e-5, LoRA on it 2e-4,
                                         what is new the recipe's rate, but at most 1e-3
--optimiser.learning_rate is given       that, all of it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from minivlm.errors import UserError
from minivlm.layers.lora import lora_parameters
from minivlm.models.clip import CLIP
from minivlm.origins import is_published
from minivlm.recipes.trained_parts import names_of

if TYPE_CHECKING:
    from minivlm.recipes.recipe import Recipe

PUBLISHED, PUBLISHED_VISION, LORA_ON_PUBLISHED, NEW_BESIDE_PUBLISHED = 2e-5, 1e-5, 2e-4, 1e-3


class Rate(NamedTuple):
    part: str  # a dotted name
    rate: float  # at its highest


def part_rates(model: nn.Module, recipe: Recipe) -> dict[nn.Parameter, Rate]:
    """The learning rate of everything that learns. UserError for --rates of what is no part, or does not learn."""
    asked = {name: Rate(name, rate) for part, rate in recipe.rates.items() for name in names_of(model, part, "--rates")}
    rates, unused = {}, set(asked)
    adapters = {id(p) for p in lora_parameters(model)}
    default = defaults(model, recipe)
    for name, parameter in model.named_parameters(
        remove_duplicate=False
    ):  # a tied one is asked for by any of its names
        above = [name[:i] for i, character in enumerate(f"{name}.") if character == "."]
        covering = [one for one in above if one in asked]
        if not parameter.requires_grad:
            continue
        if covering:
            rates[parameter] = asked[covering[-1]]
            unused -= set(covering)
        elif parameter not in rates:
            rates[parameter] = default(name, above, id(parameter) in adapters)
    if unused:
        part = sorted(unused)[0]
        raise UserError(f"--rates.{part}: nothing in it learns; leave it out, or let it learn (--freeze none).")
    return rates


def defaults(model: nn.Module, recipe: Recipe):
    """(name of a parameter, names of the modules above it, whether it is of LoRA) → its rate."""
    own = recipe.optimiser.learning_rate
    published = {name for name, module in model.named_modules() if is_published(module)}
    given = "optimiser.learning_rate" in recipe.given

    def rate(name: str, above: list[str], adapter: bool) -> Rate:
        part = name.partition(".")[0] + (" LoRA" if adapter else "")
        if given or not published:
            return Rate(part, own)
        origin = "" if "" in published else next((one for one in above if one in published), None)
        if origin is None:
            return Rate(part, min(own, NEW_BESIDE_PUBLISHED))
        part = part if origin in ("", part) else origin + (" LoRA" if adapter else "")
        if adapter:
            return Rate(part, LORA_ON_PUBLISHED)
        return Rate(
            part, PUBLISHED_VISION if isinstance(model, CLIP) or "vision" in above[-1].split(".") else PUBLISHED
        )

    return rate
