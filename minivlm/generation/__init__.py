"""Text from any model that generates: the loop, its options, rules and beam search, and what a model gives it, a `Decoding`."""

from minivlm.generation.decoding import Decoding
from minivlm.generation.loop import generate, row_seeds, stream
from minivlm.generation.options import Options
from minivlm.generation.rules import Decode

__all__ = ["Decode", "Decoding", "Options", "generate", "row_seeds", "stream"]
