"""The engine against transformers' generate, on one model of theirs, so that only the engines can differ."""

import pytest
import torch

from minivlm.generation import Options, generate
from minivlm.generation.loop import sample

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

V = 24


class Theirs:
    """A `Decoding` of a model of transformers, without a cache."""

    def __init__(self, model, tokens, room):
        self.model, self.tokens, self.room = model, tokens, room
        self.read()

    def read(self):
        self.logits = self.model(self.tokens).logits[:, -1]

    def step(self, tokens):
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.read()

    def reorder(self, rows):
        self.tokens, self.logits = self.tokens[rows], self.logits[rows]


def llama(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.8)  # neither sure of a word nor indifferent
    return model


@torch.no_grad()
def both(seed, *, rows=3, length=5, end_tokens=(), max_new_tokens=12, **options):
    """The same prompts and options → our answers and theirs."""
    model, prompt = llama(seed), torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))
    forced = options.get("forced_eos_token_id", ())
    forced = {"forced_eos_token_id": [forced] if isinstance(forced, int) else forced}
    settings = Options(max_new_tokens=max_new_tokens, end_tokens=end_tokens, pad_token=V - 1, **{**options, **forced})
    ours = generate(Theirs(model, prompt, max_new_tokens), settings, prompt=prompt)
    if options.get("num_beams", 1) == 1:
        options.pop("length_penalty", None)
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=V - 1,
        **{**({"early_stopping": False} if "num_beams" in options else {}), **options},
    )
    return ours.tolist(), theirs[:, length:].tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options", [{}, {"end_tokens": (3,)}, {"end_tokens": (3, 7, 9), "repetition_penalty": 1.6}], ids=str
)
def test_greedy(seed, options):
    ours, theirs = both(seed, **options)
    assert ours == theirs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("end_tokens", [(), (3,), (3, 7), (0, 3, 7, 9, 12)], ids=str)
def test_beam_search(seed, length_penalty, end_tokens):
    for num_beams, length, n in ((2, 5, 12), (3, 1, 7), (5, 9, 20)):
        ours, theirs = both(
            seed,
            length=length,
            max_new_tokens=n,
            end_tokens=end_tokens,
            num_beams=num_beams,
            length_penalty=length_penalty,
        )
        assert ours == theirs


RULES = {
    "no word twice": {"no_repeat_ngram_size": 1},
    "no pair twice": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.5},
    "bad words": {"bad_words_ids": [[4], [3], [9, 8], [11, 2, 5], [7, 7], *([i, i] for i in range(V))]},
    "suppressed": {"suppress_tokens": [1, 2, 3, 20], "begin_suppress_tokens": [4, 5, 6, 7]},
    "not too short": {"min_new_tokens": 6},
    "not too short with the prompt": {"min_length": 9, "repetition_penalty": 1.2},
    "forced": {"forced_eos_token_id": 3, "forced_bos_token_id": 5, "begin_suppress_tokens": [5]},
    "two forced ends": {"forced_eos_token_id": [3, 4], "suppress_tokens": [4]},
}


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_rules(rules, num_beams, length):
    ours, theirs = zip(
        *(both(seed, length=length, end_tokens=(3, 7, 11, 15), num_beams=num_beams, **rules) for seed in range(4)),
        strict=True,
    )
    assert ours == theirs
    free = [both(seed, length=length, end_tokens=(3, 7, 11, 15), num_beams=num_beams)[0] for seed in range(4)]
    assert list(ours) != free  # else nothing was tested


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 3.0])
def test_when_beam_search_stops(early_stopping, length_penalty):
    options = dict(end_tokens=(3, 7, 9), num_beams=3, max_new_tokens=16, length_penalty=length_penalty)
    for seed in range(2):
        ours, theirs = both(seed, early_stopping=early_stopping, **options)
        assert ours == theirs


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_with_a_repetition_penalty(seed):
    ours, theirs = both(seed, end_tokens=(3, 7), num_beams=3, repetition_penalty=1.4)
    assert ours == theirs


def test_the_answers_compared_have_different_lengths():
    lengths = {len(both(seed, rows=1, end_tokens=(3, 7), num_beams=3)[0][0]) for seed in range(8)}
    assert len(lengths) > 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_k": 6, "top_p": 0.8},
        {"top_p": 0.05},
        {"min_p": 0.2},
        {"top_p": 0.9, "min_p": 0.1},
        {"top_k": 9, "min_p": 0.3},
    ],
    ids=str,
)
def test_sampling_leaves_the_same_probabilities(options):
    """A grid of uniform numbers shows ours; theirs are the softmax of what their filters leave."""
    n, logits = 20_000, torch.randn(1, V) * 2
    warpers = [transformers.TemperatureLogitsWarper(0.8)]
    if "top_k" in options:
        warpers.append(transformers.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(transformers.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(transformers.generation.MinPLogitsWarper(options["min_p"]))
    expected = logits
    for warp in warpers:
        expected = warp(None, expected)
    uniform = torch.arange(1, n + 1) / n
    chosen = sample(logits.expand(n, V), uniform, Options(temperature=0.8, **options))
    assert (chosen.bincount(minlength=V) / n - expected.softmax(-1)[0]).abs().max() < 2 / n
