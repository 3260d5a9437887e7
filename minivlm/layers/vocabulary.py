"""The table of the tokens that a model knows, and how it learns to know one more."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from minivlm.errors import UserError
from minivlm.origins import copy_marks
from minivlm.precision import cast


class TokenEmbedding(nn.Embedding):
    """ids of any shape → (…, D). UserError for a token beyond the table (on a CPU; a GPU would have to be waited for): a
    tokeniser may know marks that no text need have, as BLIP-2's for retrieval has `<image>`."""

    def forward(self, tokens: Tensor) -> Tensor:
        try:
            return super().forward(tokens)
        except IndexError:
            rows, low, high = self.num_embeddings, int(tokens.min()), int(tokens.max())
            raise UserError(
                f"the text has token {low if low < 0 else high}, but the model knows tokens 0 to {rows - 1}: it is another "
                "model's tokeniser, or a mark that the tokeniser alone knows, which has to be left out."
            ) from None


def with_vocabulary(model: nn.Module, size: int) -> nn.Module:
    """A `LanguageModel` or `T5` that knows `size` tokens, or itself if it knows as many already.

    The rows of new tokens are the mean of the others: unlikely words rather than random ones.
    """
    if size <= model.config.vocab_size:
        return model
    grown = type(model)(replace(model.config, vocab_size=size))
    cast(grown, model.dtype)
    state = model.state_dict()
    for name in ("token_embedding.weight", "head.weight"):
        row = state[name].mean(dim=0, keepdim=True)
        state[name] = torch.cat([state[name], row.expand(size - len(state[name]), -1)])
    grown.load_state_dict(state)
    copy_marks(model, grown)
    return grown
