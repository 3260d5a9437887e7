"""What all models with pictures in front of, or inside, a language model's text have in common when they speak."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from minivlm import generation
from minivlm.base import Model


class SpeakingModel(Model):
    """It has a `language_model`, and a `begin(images, tokens, mask, room=…)` that gives a `generation.Decoding`."""

    def generate(
        self,
        images: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        decode: generation.Decode | None = None,
        **options,
    ) -> Tensor:
        """tokens (B, T) → (B, ≤ max_new_tokens); options: see `generation.Options`."""
        options = self.options(max_new_tokens=max_new_tokens, **options)
        decoding = self.begin(images, tokens, mask, room=max_new_tokens)
        return generation.generate(decoding, options, prompt=tokens, prompt_mask=mask, decode=decode)

    def stream(
        self,
        images: Tensor | None,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        decode: generation.Decode | None = None,
        **options,
    ) -> Iterator[Tensor]:
        """`generate`, token by token: each (B,)."""
        options = self.options(max_new_tokens=max_new_tokens, **options)
        decoding = self.begin(images, tokens, mask, room=max_new_tokens)
        return generation.stream(decoding, options, prompt=tokens, prompt_mask=mask, decode=decode)

    def options(self, **given) -> generation.Options:
        """What is not given is as the language model's config says."""
        return self.language_model.options(**given)
