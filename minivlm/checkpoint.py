"""A model in a directory.

    config.json          {"minivlm": version, "model": "CLIP", "config": {…}, "processor": {…}}
    model.safetensors    every tensor under the name it has in the model
    tokenizer.json       as the `tokenizers` library writes it

`save` writes it whole or not at all (see `minivlm.saving`); `load` reads published directories and hub ids as well
(see `minivlm.loading` and `minivlm.pretrained`).
"""

from minivlm.loading import load
from minivlm.saving import save

__all__ = ["load", "save"]
