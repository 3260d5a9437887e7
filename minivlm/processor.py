"""Turns images and strings into tensors, and token ids into strings.

    images   ─ resize ─ crop ─ (x·rescale − mean) / std ─→ (B, 3, S, S), or (B, 1 + n², 3, S, S) with n × n tiles
    strings  ─ tokeniser ─ padding on the right         ─→ tokens (B, T), mask (B, T)

The steps and their rounding are those of the published preprocessing, to the bit where that works on PIL images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from minivlm.chat_templates import TEMPLATES
from minivlm.errors import UserError
from minivlm.image_preprocessing import Picture, as_list, normalise, open_image, views
from minivlm.processor_config import CLIP_MEAN, CLIP_STD, ProcessorConfig
from minivlm.special_tokens import PLACEHOLDER, WORD, Markup, SpecialTokens, Text, split_placeholders

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Processor:
    """tokenizer: a `tokenizers.Tokenizer`, or the bytes of its JSON, which are parsed when the first text comes (50,000
    tokens take 0.1 s), or None for a model of which only the images are wanted."""

    def __init__(self, tokenizer: Tokenizer | bytes | None, config: ProcessorConfig):
        self.source, self.config = tokenizer, config

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def context(self) -> int:
        return self.config.context

    def __call__(
        self,
        images: Picture | Sequence[Picture] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str = "pt",
        padding: bool | str = True,
    ) -> dict[str, Tensor]:
        """Images, texts or both as the keyword arguments of a model: {"images": …, "tokens": …, "mask": …}.

        See `images` and `text`; each `<image>` becomes its placeholders. return_tensors and padding have the one value that
        is true of this processor, "pt" and True or "longest": UserError for any other, and where nothing is given.
        """
        if return_tensors != "pt" or padding not in (True, "longest"):
            raise UserError(
                f"return_tensors is {return_tensors!r} and padding {padding!r}, but a processor returns PyTorch tensors, "
                "padded to the longest text: leave both out."
            )
        if images is None and text is None:
            raise UserError("a processor needs images, text or both: write processor(images=…, text=…).")
        inputs = {} if images is None else {"images": self.images(images)}
        return inputs | (
            {} if text is None else dict(zip(("tokens", "mask"), self.text(text, expand=True), strict=True))
        )

    # ---- images ------------------------------------------------------------------------------------------------------

    def images(self, images: Picture | Sequence[Picture]) -> Tensor:
        """PIL images, paths or (H, W, 3) uint8 arrays → (B, 3, S, S) float32; with tiles (B, 1 + n², 3, S, S).

        One image makes a batch of one. What this has returned before, for an image each, is put together as it is.
        Raises UserError for a file that holds no image, and where images that are not cropped differ in size.
        """
        n, S, images = self.config.tiles, self.image_size, list(as_list(images))
        if images and all(isinstance(image, Tensor) for image in images):
            check_sizes({tuple(image.shape[-2:]) for image in images})
            return torch.cat(images)
        arrays = [array for image in images for array in views(open_image(image), self.config)]
        check_sizes({array.shape[:2] for array in arrays})
        pixels = torch.from_numpy(normalise(np.stack(arrays), self.config)) if arrays else torch.empty(0, 3, S, S)
        return pixels if n == 1 else pixels.view(-1, 1 + n * n, *pixels.shape[1:])

    # ---- strings -----------------------------------------------------------------------------------------------------

    def text(self, strings: str | Sequence[str], *, cut: bool = False, expand: bool = False) -> tuple[Tensor, Tensor]:
        """B strings → tokens (B, T) int64, mask (B, T) bool, True = a real token; T is that of the longest.

        One string makes a batch of one.
        cut: a text longer than the context loses its last words, but not its end token. Otherwise nothing is ever cut:
        it comes back longer, and the model refuses it. expand: each `<image>` becomes as many placeholders as an image
        has features; without, it is one token, as the published tokenisers have it (`generate` takes both).
        """
        rows = self.encode([strings] if isinstance(strings, str) else strings)
        if expand:
            rows = [self.expand(row) for row in rows]
        if cut:
            rows = [self.cut(row) for row in rows]
        T = max([len(row) for row in rows] + [self.context if self.config.pad_to_context else 0])
        tokens = torch.full((len(rows), T), self.pad_token)
        mask = torch.zeros(len(rows), T, dtype=torch.bool)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, : len(row)] = True
        return tokens, mask

    def encode(self, texts: Sequence[Text], *, frame: bool = True) -> list[list[int]]:
        """The ids of each text, start and end tokens included (frame), neither cut nor padded. An `<image>` is one
        token, as the published tokenisers have it; `ids` expands it to the placeholders of an image."""
        if isinstance(texts, str):
            raise TypeError(f"a list of strings is wanted, not one string: [{texts!r}]")
        return self.special_tokens.encode([self.pieces(text) for text in texts], frame=frame)

    def ids(self, text: Text, *, frame: bool = False) -> list[int]:
        """The ids of a piece of text, each `<image>` expanded; frame: with the start and end tokens of a whole one."""
        return self.expand(self.encode([text], frame=frame)[0])

    def pieces(self, text: Text) -> list[str]:
        """Markup and text (see `minivlm.special_tokens`). In a string `<image>` is Markup, if images stand among
        the tokens of this model's texts."""
        placeholder = self.config.image_token
        if not isinstance(text, str):
            return [
                Markup(placeholder) if isinstance(piece, Markup) and piece == PLACEHOLDER else piece for piece in text
            ]
        if isinstance(text, Markup):
            return [text]
        if self.config.image_tokens:
            return split_placeholders(text, *filter(None, (placeholder, self.config.image_fence)))
        return [text.replace(WORD, "")]

    @property
    def special_tokens(self) -> SpecialTokens:
        """The tokens that no text may spell. They are found anew when the tokeniser has been given more tokens."""
        known = self.__dict__.get("_special_tokens")
        if known is None or known.size != self.tokenizer.get_vocab_size():
            c = self.config
            template = c.chat_format if c.chat == "own" else TEMPLATES.get(c.chat)
            markup = template.markup if template else ""
            known = SpecialTokens(self.tokenizer, {c.image_token, c.image_fence, c.pad_token}, markup)
            self.__dict__["_special_tokens"] = known
        return known

    def expand(self, ids: list[int]) -> list[int]:
        """Every `<image>` becomes as many placeholders as an image has features, between fences where the model has them."""
        placeholder, n = self.image_token_id, self.config.image_tokens
        if not n or placeholder not in ids:
            return ids
        fence = [] if self.config.image_fence is None else [self.tokenizer.token_to_id(self.config.image_fence)]
        whole = [token for id in ids for token in (fence + [id] * n + fence if id == placeholder else [id])]
        return [id for id, before in zip(whole, [None, *whole[:-1]], strict=True) if not (id == before and id in fence)]

    @cached_property
    def image_token_id(self) -> int | None:
        return self.tokenizer.token_to_id(self.config.image_token)

    @cached_property
    def placeholder_tokens(self) -> tuple[int, ...]:
        """The tokens that say where images stand, `<image>` and its fence, which are never generated."""
        fence = None if self.config.image_fence is None else self.tokenizer.token_to_id(self.config.image_fence)
        return tuple(id for id in (self.image_token_id, fence) if id is not None)

    def cut(self, row: list[int]) -> list[int]:
        if len(row) <= self.context:
            return row
        return [*row[: self.context - 1], self.end_token] if row[-1] == self.end_token else row[: self.context]

    def too_long(self, strings: Sequence[str]) -> int:
        """The number of strings that do not fit the context, and would be cut."""
        # No tokeniser makes more of ASCII than its letters, and what stands around a text is a few tokens.
        perhaps = [text for text in strings if not text.isascii() or len(text) + 8 > self.context]
        return sum(len(row) > self.context for row in self.encode(perhaps))

    def decode(self, ids: Tensor | Sequence) -> list[str]:
        """(B, T), or B rows of ids → B strings, each up to its end token, without special tokens."""
        rows = [row.tolist() if isinstance(row, Tensor) else list(row) for row in ids]
        end = self.end_token
        rows = [row[: row.index(end)] if end in row else row for row in rows]
        before, after = self.margins
        return [text.removeprefix(before).removesuffix(after) for text in self.spell(rows)]

    def spell(self, rows: list[list[int]]) -> list[str]:
        texts = self.tokenizer.decode_batch(rows, skip_special_tokens=True)
        suffix = getattr(self.tokenizer.model, "end_of_word_suffix", None)  # "</w>" in CLIP's vocabulary
        texts = [text.replace(suffix, " ") for text in texts] if suffix else texts
        return [tidy(text) for text in texts] if self.tidies else texts

    @property
    def tidies(self) -> bool:
        """Byte pairs know where spaces stand, and keep theirs, as transformers has it."""
        return self.config.tidy and type(self.tokenizer.model).__name__ != "BPE"

    @cached_property
    def margins(self) -> tuple[str, str]:
        """The characters that the tokeniser puts before and after texts, so that a word is one token anywhere: " ", or ""."""
        before, _, after = self.spell([self.ids("a")])[0].partition("a")
        return before, after

    # ---- tokeniser ---------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        if self.source is None:
            raise UserError(
                "there is no tokeniser beside these weights, so texts cannot be read: a tokenizer.json is wanted, which "
                "transformers makes of other forms (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))."
            )
        if isinstance(self.source, bytes):
            try:
                tokenizer = Tokenizer.from_buffer(self.source)
            except Exception as error:  # the only class that tokenizers raises
                raise UserError(f"tokenizer.json cannot be read as a tokeniser ({error}).") from None
        else:
            tokenizer = self.source
        tokenizer.no_padding()  # some files ask for either; both are done here
        tokenizer.no_truncation()
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @cached_property
    def pad_token(self) -> int:
        if isinstance(self.config.pad_token, int):
            return self.config.pad_token
        if (pad := self.tokenizer.token_to_id(self.config.pad_token)) is None:
            raise UserError(f"the tokeniser has no token {self.config.pad_token!r}, which is to be its padding.")
        return pad

    @property
    def start_token(self) -> int | None:
        return self.frame[0]

    @property
    def end_token(self) -> int | None:
        return self.frame[1]

    @property
    def answer_end(self) -> int | None:
        """The token that ends an answer, where its chat template names none."""
        return self.config.answer_end if self.end_token is None else self.end_token

    @cached_property
    def frame(self) -> tuple[int | None, int | None]:
        """The tokens that are put before and after every text."""
        encoding = self.tokenizer.encode("a")
        ids, special = encoding.ids or [None], encoding.special_tokens_mask or [0]
        return ids[0] if special[0] else None, ids[-1] if special[-1] else None

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int = 1024,
        image_size: int,
        context: int,
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
    ) -> Processor:
        """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019, §2.2) of the texts; same texts, same tokens.

        A text becomes <start> … <end>. The end token has the largest of the special ids, never 2: transformers reads
        that number as "the largest id ends the text".
        """
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

        special = ["<pad>", "<start>", "<image>", "<end>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that nothing is unknown
        if vocab_size < len(special) + len(alphabet):
            least = len(special) + len(alphabet)
            raise UserError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone are {least}.")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is one token wherever it is
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        ends = [(token, special.index(token)) for token in ("<start>", "<end>")]
        tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
        config = ProcessorConfig(image_size=image_size, context=context, mean=mean, std=std, pad_token=0)
        return cls(tokenizer, config)


def check_sizes(shapes: set[tuple[int, int]]) -> None:
    if len(shapes) > 1:
        sizes = ", ".join(f"{h}×{w}" for h, w in sorted(shapes)[:4])
        raise UserError(f"without a crop these images have different sizes ({sizes}): give them one at a time.")


MARKS = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"}
TIDY = {**MARKS, **{f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")}}


def tidy(text: str) -> str:
    """The text without spaces before punctuation, as transformers has it where clean_up_tokenization_spaces is set."""
    for apart, together in TIDY.items():
        text = text.replace(apart, together)
    return text
