from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm.layers import LanguageModel
from minivlm.losses import labelled, next_token_loss
from minivlm.testing import (
    assert_batch_independent,
    assert_can_overfit,
    assert_causal,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_same,
    assert_same_gradients,
)
from tests import languages

B, T, V, D = 3, 8, 30, 16
GPT2, OPT, OPT_350M, LLAMA, QWEN2, NEOX = (
    replace(config, context=20)
    for config in (languages.GPT2, languages.OPT, languages.OPT_350M, languages.LLAMA, languages.QWEN2, languages.NEOX)
)
CONFIGS = {
    "gpt2": GPT2,
    "opt": OPT,
    "opt-350m": OPT_350M,
    "llama": LLAMA,
    "llama with a head of its own": replace(LLAMA, tie_head=False),
    "qwen2": QWEN2,
    "gpt_neox": NEOX,
}
LENGTHS = torch.tensor([[T], [3], [5]])
MASK = torch.arange(T) < LENGTHS
HOLES = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1]], dtype=torch.bool)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(config):
    return LanguageModel(config).double().eval()


def texts(rows=B, length=T):
    return torch.randint(0, V, (rows, length))


@every_config
class TestForward:
    def test_one_token_sees_what_came_before_it(self, config):
        model = model_of(config)
        assert_causal(lambda x: model(embeddings=x).logits, torch.randn(B, T, D).double())

    def test_padding_and_neighbours_do_not_matter(self, config):
        model, x = model_of(config), torch.randn(B, T, D).double()
        f = lambda x, mask: model(embeddings=x, mask=mask).logits
        assert_padding_invariant(f, x, MASK)
        assert_batch_independent(f, x, MASK)

    def test_a_token_stands_where_it_does_among_the_real_ones(self, config):
        """Padding in front of them, or between: the real ones get what they get without it."""
        model, tokens = model_of(config), texts()
        logits = model(tokens, HOLES).logits
        for i in range(B):
            assert_same(logits[i][HOLES[i]], model(tokens[i][HOLES[i]][None]).logits[0])

    def test_embeddings_instead_of_tokens(self, config):
        model, tokens = model_of(config), texts()
        x = model.embed(tokens)
        assert x.shape == (B, T, D)
        assert torch.equal(model(embeddings=x).logits, model(tokens).logits)

    def test_gradients_reach_all(self, config):
        model = model_of(config)
        weights = {
            n: p for n, p in model.named_parameters() if not n.endswith("k_proj.bias")
        }  # shifts all scores alike
        assert_gradient_reaches(model(texts(), labels=texts()).loss, weights)

    def test_with_a_cache_it_goes_on(self, config):
        model, tokens = model_of(config), texts()
        cache = model.transformer.new_cache(B, T)
        with torch.no_grad():
            pieces = [model.states(model.embed(piece), cache=cache) for piece in tokens.split([3, 1, 4], dim=1)]
        assert_same(torch.cat(pieces, dim=1), model.states(model.embed(tokens)))


class TestConfig:
    def test_positions_are_read_behind_the_offset(self):
        model, moved = model_of(GPT2), model_of(replace(GPT2, position_offset=2))
        state = model.state_dict()
        state["position_embedding.weight"] = F.pad(state["position_embedding.weight"], (0, 0, 2, 0), value=torch.nan)
        moved.load_state_dict(state)
        tokens = texts()
        assert torch.equal(moved(tokens).logits, model(tokens).logits)

    def test_without_any_positions_words_are_a_set_to_the_last_one(self):
        model, tokens = model_of(replace(GPT2, positions="none", depth=1)), texts(1)
        assert model.position_embedding is None
        other = tokens[:, [3, 1, 0, 2, 6, 5, 4, 7]]
        assert_same(model(other).logits[:, -1], model(tokens).logits[:, -1])

    def test_a_tied_head_is_the_embedding_and_stays_so(self):
        model = LanguageModel(GPT2)
        assert model.head.weight is model.token_embedding.weight
        assert model.bfloat16().head.weight is model.token_embedding.weight
        assert LanguageModel(replace(GPT2, tie_head=False)).head.weight is not model.token_embedding.weight

    def test_narrow_embeddings(self):
        model = model_of(CONFIGS["opt-350m"])
        assert model.token_embedding.weight.shape == (V, 6) and model.norm is None
        output = model(texts())
        assert output.hidden.shape == (B, T, 6) and output.logits.shape == (B, T, V)

    def test_the_seed_alone_says_what_the_weights_are(self):
        torch.manual_seed(1)
        first = LanguageModel(LLAMA, seed=3).state_dict()
        torch.manual_seed(2)
        again, other = LanguageModel(LLAMA, seed=3).state_dict(), LanguageModel(LLAMA, seed=4).state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])

    def test_starts_near_chance(self):
        model = LanguageModel(replace(GPT2, width=64, vocab_size=500))
        tokens = torch.randint(0, 500, (8, 20))
        assert model(tokens, labels=tokens).loss.item() == pytest.approx(torch.tensor(500.0).log().item(), abs=0.1)

    def test_a_text_longer_than_the_context(self):
        with pytest.raises(ValueError, match="texts have 21 tokens, but the context is 20"):
            model_of(GPT2)(texts(1, 21))


class TestLoss:
    def test_logits_are_computed_when_they_are_looked_at(self):
        model, calls = model_of(GPT2), []
        model.head.register_forward_hook(lambda *_: calls.append(1))
        output = model(texts(), labels=texts())
        assert calls == [] and output.loss.isfinite()
        assert output.logits is output.logits and calls == [1]

    def test_no_labels_no_loss(self):
        assert model_of(GPT2)(texts()).loss is None

    def test_each_token_is_judged_by_the_next_label(self):
        model, tokens = model_of(LLAMA), texts()
        labels = tokens.masked_fill(~MASK, -100)
        log_p = model(tokens).logits.log_softmax(dim=-1)
        surprises = [-log_p[i, t - 1, tokens[i, t]] for i in range(B) for t in range(1, T) if MASK[i, t]]
        expected = torch.stack(surprises).mean()
        assert_same(model(tokens, MASK, labels).loss, expected)
        assert_same(model.losses(tokens, labels)["next token"], expected)

    @pytest.mark.parametrize("first", [0, 1, 4, T - 1])
    @pytest.mark.parametrize("config", ["gpt2", "opt-350m", "llama", "gpt_neox"])
    def test_the_labelled_positions_may_be_given(self, config, first):
        model = model_of(CONFIGS[config])
        labels = texts()
        labels[:, :first] = -100
        labels[1:, : first + 1] = -100  # rows need not begin together

        def whole(x):
            return next_token_loss(model.states(x), labels, model.head.weight)

        x = torch.randn(B, T, D).double()
        assert_same_gradients(whole, lambda x: model(embeddings=x, labels=labels).loss, [x], model)
        given = lambda x: model(embeddings=x, labels=labels, where=labelled(labels)).loss
        assert_same_gradients(whole, given, [x], model)

    def test_learns(self):
        model = LanguageModel(LLAMA)
        assert_can_overfit(model, texts(), lambda m, tokens: m.losses(tokens, tokens)["next token"], learning_rate=0.01)


class TestSpeaking:
    """Which token is chosen is `test_generation`'s matter; here, that every row is asked for its own continuation."""

    @every_config
    @pytest.mark.parametrize("mask", [None, MASK, HOLES], ids=["whole", "padded", "with holes"])
    def test_every_step_is_the_full_forward_of_what_was_said(self, config, mask):
        model, tokens = model_of(config), texts()
        decoding = model.prefill(tokens, mask, room=4)
        rows = [tokens[i] if mask is None else tokens[i][mask[i]] for i in range(B)]
        for step in range(5):
            for i, row in enumerate(rows):
                assert_same(decoding.logits[i], model(row[None]).logits[0, -1].float(), f"row {i}, step {step}")
            if step < 4:
                said = decoding.logits.argmax(dim=-1)
                decoding.step(said)
                rows = [torch.cat([row, said[i : i + 1]]) for i, row in enumerate(rows)]
        assert decoding.room == 0

    def test_generate_and_stream(self):
        model, tokens = model_of(LLAMA), texts()
        expected = tokens
        for _ in range(5):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(dim=-1)], dim=1)
        said = model.generate(tokens, max_new_tokens=5)
        assert torch.equal(said, expected[:, T:])
        assert torch.equal(torch.stack(list(model.stream(tokens, max_new_tokens=5)), dim=1), said)

    def test_a_batch_is_its_rows_alone(self):
        model, tokens = model_of(LLAMA), texts()
        batch = model.generate(tokens, MASK, max_new_tokens=5)
        for i in range(B):
            assert torch.equal(batch[i : i + 1], model.generate(tokens[i : i + 1, : LENGTHS[i]], max_new_tokens=5))

    def test_ends_and_pads_as_the_config_says_unless_told_otherwise(self):
        free = model_of(LLAMA)
        tokens = texts(2)
        said = free.generate(tokens, max_new_tokens=6)
        end = said[0, 2].item()
        model = LanguageModel(replace(LLAMA, end_tokens=(end,), pad_token=29)).double().eval()
        model.load_state_dict(free.state_dict())
        ended = model.generate(tokens, max_new_tokens=6)
        first = said[0].tolist().index(end)
        assert ended[0].tolist() == said[0, : first + 1].tolist() + [29] * (ended.shape[1] - first - 1)
        assert torch.equal(model.generate(tokens, max_new_tokens=6, end_tokens=()), said)

    def test_embeddings_are_as_good_as_tokens(self):
        model, tokens = model_of(LLAMA), texts()
        assert torch.equal(
            model.prefill(embeddings=model.embed(tokens), mask=MASK, room=1).logits,
            model.prefill(tokens, MASK, room=1).logits,
        )

    def test_the_head_reads_the_last_token_alone(self):
        model, read = model_of(LLAMA), []
        model.head.register_forward_hook(lambda module, inputs, output: read.append(tuple(inputs[0].shape)))
        model.prefill(texts(), room=1)
        model.prefill(texts(), MASK, room=1)
        assert read == [(B, D), (B, D)]

    def test_a_prompt_that_leaves_no_room(self):
        with pytest.raises(ValueError, match="a prompt of 8 tokens and 13 new ones do not fit the context of 20"):
            model_of(LLAMA).prefill(texts(), room=13)

    def test_a_row_without_a_token(self):
        with pytest.raises(ValueError, match="a row of the prompt has no token"):
            model_of(LLAMA).prefill(texts(), MASK & (torch.arange(B) != 1)[:, None], room=1)
