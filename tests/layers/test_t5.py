from dataclasses import replace

import pytest
import torch

from minivlm.layers import T5, T5Config
from minivlm.testing import (
    assert_batch_independent,
    assert_can_overfit,
    assert_causal,
    assert_generation_independent,
    assert_gradient_reaches,
    assert_padding_invariant,
    assert_same,
)

B, S, T, V, D = 3, 8, 6, 30, 16
FIRST = T5Config(vocab_size=V, width=D, depth=2, heads=2, scale_head=True, start_token=5)
FLAN = replace(
    FIRST, decoder_depth=1, head_width=6, mlp_width=24, activation="gelu_tanh", gated_mlp=True, tie_head=False,
    scale_head=False, relative_buckets=8, relative_distance=6, start_token=0,
)  # fmt: skip
CONFIGS = {"t5": FIRST, "flan-t5": FLAN, "t5 with a deep decoder": replace(FIRST, decoder_depth=3, scale_head=False)}
LENGTHS = torch.tensor([[S], [3], [5]])
MASK = torch.arange(S) < LENGTHS
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(config):
    """In double, and with attention that is not nearly even."""
    model = T5(config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def texts(rows=B, length=S):
    return torch.randint(6, V, (rows, length))


@every_config
class TestForward:
    def test_the_decoder_sees_what_was_said_before(self, config):
        model, tokens = model_of(config), texts()
        read = model.encode(tokens)

        def foretell(x):
            return model.decoder_norm(model.decoder(x, read))

        assert_causal(foretell, torch.randn(B, T, D).double())
        labels = texts(length=T)
        other = labels.clone()
        other[:, 3] = 7
        a, b = model(tokens, labels=labels).logits, model(tokens, labels=other).logits
        assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4], b[:, 4])

    def test_the_encoder_sees_both_sides(self, config):
        model, tokens = model_of(config), texts()
        other = tokens.clone()
        other[:, -1] = (tokens[:, -1] + 1) % V
        assert not torch.allclose(model.encode(tokens)[:, 0], model.encode(other)[:, 0])

    def test_padding_and_neighbours_do_not_matter(self, config):
        model, x, labels = model_of(config), torch.randn(B, S, D).double(), texts(length=T)
        encode = lambda x, mask: model.encode(embeddings=x, mask=mask)
        assert_padding_invariant(encode, x, MASK)
        f = lambda x, mask, labels: model(embeddings=x, mask=mask, labels=labels).logits
        assert_batch_independent(f, x, MASK, labels)
        for i, n in enumerate(LENGTHS[:, 0].tolist()):
            assert_same(f(x, MASK, labels)[i], f(x[i : i + 1, :n], None, labels[i : i + 1])[0])

    def test_padding_on_the_left_is_as_good(self, config):
        model, tokens, labels = model_of(config), texts(), texts(length=T)
        left = torch.stack([row.roll(S - n) for row, n in zip(tokens, LENGTHS[:, 0].tolist(), strict=True)])
        assert_same(model(left, MASK.flip(1), labels).logits, model(tokens, MASK, labels).logits)

    def test_embeddings_instead_of_tokens(self, config):
        model, tokens, labels = model_of(config), texts(), texts(length=T)
        x = model.embed(tokens)
        assert torch.equal(model(embeddings=x, labels=labels).logits, model(tokens, labels=labels).logits)

    def test_words_are_not_a_set(self, config):
        """Nothing but the position biases tells their order."""
        model, tokens, labels = model_of(config), texts(), texts(length=T)
        turned = model(tokens.flip(1), labels=labels).logits
        assert not torch.allclose(turned, model(tokens, labels=labels).logits)
        model.encoder.relative.table.weight.data.zero_()
        assert_same(model(tokens.flip(1), labels=labels).logits, model(tokens, labels=labels).logits)

    def test_gradients_reach_all(self, config):
        model = model_of(config)
        assert_gradient_reaches(model(texts(length=40), labels=texts(length=40)).loss, model)


class TestConfig:
    def test_one_attention_by_hand(self):
        """Scores are q·k plus the bias of the distance; nothing is divided by √K."""
        model, x = model_of(FIRST), torch.randn(1, 4, D).double()
        attention = model.encoder.blocks[0].attention
        q, k, v = (getattr(attention, f"{n}_proj")(x).view(4, 2, 8).transpose(0, 1) for n in "qkv")
        table = (
            model.encoder.relative.table.weight
        )  # few keys, so each distance has a bucket: behind 0, 1 …, ahead 17 …
        bias = torch.stack([table[q - k if k <= q else 16 + k - q] for q in range(4) for k in range(4)]).view(4, 4, 2)
        weights = (q @ k.mT + bias.movedim(-1, 0)).softmax(dim=-1)
        expected = attention.out_proj((weights @ v).transpose(0, 1).reshape(1, 4, D))
        assert_same(attention(x, bias=model.encoder.relative(torch.arange(4), 4)), expected)

    def test_a_scaled_head(self):
        plain, scaled = T5(replace(FIRST, scale_head=False)), T5(FIRST)
        scaled.load_state_dict(plain.state_dict())
        tokens, labels = texts(), texts(length=T)
        assert_same(4 * scaled(tokens, labels=labels).logits, plain(tokens, labels=labels).logits)  # √16

    def test_depths_and_tied_heads(self):
        assert [len(model.decoder.blocks) for model in map(T5, CONFIGS.values())] == [2, 1, 3]
        assert all(block.cross_attention is not None for block in T5(FIRST).decoder.blocks)
        model = T5(FIRST).bfloat16()
        assert model.head.weight is model.token_embedding.weight
        assert T5(FLAN).head.weight is not T5(FLAN).token_embedding.weight
        assert not any("bias" in name for name, _ in model.named_parameters())

    def test_the_seed_alone_says_what_the_weights_are(self):
        torch.manual_seed(1)
        first = T5(FLAN, seed=3).state_dict()
        torch.manual_seed(2)
        again, other = T5(FLAN, seed=3).state_dict(), T5(FLAN, seed=4).state_dict()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[n], other[n]) for n in first if "norm" not in n)

    def test_starts_near_chance(self):
        model = T5(replace(FLAN, width=64, head_width=32, vocab_size=500))
        loss = model(torch.randint(0, 500, (8, 20)), labels=torch.randint(0, 500, (8, 20))).loss
        assert loss.item() == pytest.approx(torch.tensor(500.0).log().item(), abs=0.1)


class TestLoss:
    def test_each_label_is_judged_by_what_was_said_before_it(self):
        model, tokens, labels = model_of(FLAN), texts(), texts(length=T)
        labels[1, 4:] = labels[2, 2:] = -100
        output = model(tokens, MASK, labels)
        surprises = []
        for i, n in enumerate((6, 4, 2)):
            for t in range(n):
                said = torch.cat([torch.tensor([FLAN.start_token]), labels[i, :t]])[None]
                read = model.encode(tokens[i : i + 1, : LENGTHS[i]])
                log_p = model.head(model.states(said, read))[0, -1].log_softmax(dim=-1)
                assert_same(output.logits[i, t].log_softmax(dim=-1), log_p)
                surprises.append(-log_p[labels[i, t]])
        assert_same(output.loss, torch.stack(surprises).mean())
        assert torch.equal(model.losses(tokens, MASK, labels)["next token"], output.loss)

    def test_a_label_that_does_not_count_is_heard_as_padding(self):
        """Also one with others behind it, which hear it; and the last is never heard."""
        config = replace(FLAN, start_token=2, pad_token=7)
        labels = torch.tensor([[-100, 5, -100, 6], [4, 5, -100, -100]])
        assert model_of(config).shift(labels).tolist() == [[2, 7, 5, 7], [2, 4, 5, 7]]
        model, tokens = model_of(config), texts(2)
        heard = torch.tensor([[2, 7, 5, 7], [2, 4, 5, 7]])
        logits = model.head(model.states(heard, model.encode(tokens)))
        said = labels != -100
        loss = torch.nn.functional.cross_entropy(logits[said], labels[said])
        assert_same(model(tokens, labels=labels).loss, loss)

    def test_labels_are_needed(self):
        with pytest.raises(ValueError, match="needs labels"):
            T5(FLAN)(texts())

    def test_a_batch_in_parts_has_the_gradients_of_the_whole(self):
        model, labels = model_of(FLAN), texts(length=T)
        labels[0, 1:] = -100
        batch = {"tokens": texts(), "mask": MASK, "labels": labels}
        model.losses(**batch)["next token"].backward()
        whole = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.backward_in_parts(batch, 2)
        for a, b in zip(model.parameters(), whole, strict=True):
            assert_same(a.grad, b)

    def test_learns(self):
        model, labels = T5(FLAN), texts(length=T)
        assert_can_overfit(model, texts(), lambda m, x: m(x, MASK, labels).loss, learning_rate=0.01)


class TestSpeaking:
    @every_config
    @pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
    def test_every_step_is_the_full_forward_of_what_was_said(self, config, mask):
        model, tokens = model_of(config), texts()
        decoding, said = model.prefill(tokens, mask, room=12), torch.empty(B, 0, dtype=torch.long)
        for step in range(13):
            heard = model(tokens, mask, torch.cat([said, texts(length=1)], dim=1)).logits[:, -1]
            assert_same(decoding.logits, heard.float(), f"step {step}")
            if step < 12:
                said = torch.cat([said, heard.argmax(dim=-1)[:, None]], dim=1)
                decoding.step(said[:, -1])
        with pytest.raises(ValueError, match="no room"):
            decoding.step(said[:, -1])

    def test_generate_and_stream(self):
        model, tokens = model_of(FLAN), texts()
        said = model.generate(tokens, MASK, max_new_tokens=7)
        assert torch.equal(torch.stack(list(model.stream(tokens, MASK, max_new_tokens=7)), dim=1), said)
        assert_generation_independent(lambda t, m: model.generate(t, m, max_new_tokens=7), tokens, MASK, pad_token=0)

    def test_ends_and_pads_as_the_config_says_unless_told_otherwise(self):
        free, tokens = model_of(FLAN), texts(2)
        said = free.generate(tokens, max_new_tokens=6)
        end = said[0, 2].item()
        model = T5(replace(FLAN, end_tokens=(end,), pad_token=29)).double().eval()
        model.load_state_dict(free.state_dict())
        ended = model.generate(tokens, max_new_tokens=6)
        first = said[0].tolist().index(end)
        assert ended[0].tolist() == said[0, : first + 1].tolist() + [29] * (ended.shape[1] - first - 1)
        assert torch.equal(model.generate(tokens, max_new_tokens=6, end_tokens=()), said)

    def test_keys_and_values_of_what_was_read_are_made_once(self):
        model, made = model_of(FIRST), []
        for block in model.decoder.blocks:
            block.cross_attention.k_proj.register_forward_hook(lambda *_: made.append(1))
        model.generate(texts(), max_new_tokens=5)
        assert len(made) == 2

    def test_rows_take_what_they_have_read_along(self):
        """More rows than before, fewer, in another order: each goes on as the one it was."""
        model, tokens = model_of(FLAN), texts()
        decoding = model.prefill(tokens, MASK, room=3)
        twin = model.prefill(tokens, MASK, room=3)
        rows = torch.arange(B)
        for order in ([0, 0, 1, 1, 2, 2], [1, 0, 2, 3, 5, 4], [5, 0]):
            decoding.reorder(torch.tensor(order))
            rows = rows[order]
            assert_same(decoding.logits, twin.logits[rows])
            decoding.step(rows)
            twin.step(torch.arange(B))
            assert_same(decoding.logits, twin.logits[rows])

    def test_beams_that_have_read_the_same_copy_nothing(self):
        model = model_of(FLAN)
        decoding = model.prefill(texts(), MASK, room=3)
        decoding.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
        before = decoding.context
        decoding.reorder(torch.tensor([1, 0, 3, 3, 4, 5]))
        assert decoding.context is before
        decoding.reorder(torch.tensor([2, 3, 0, 1, 4, 5]))
        assert decoding.context is not before

    def test_beam_search_finds_the_likeliest_of_all_answers(self):
        """Of 4 words and two steps: every answer is tried by hand."""
        small = replace(FLAN, vocab_size=4)
        model = model_of(small)
        tokens = torch.randint(0, 4, (2, S))
        answers = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        for i in range(2):
            log_p = model(tokens[i : i + 1].expand(16, S), labels=answers).logits.log_softmax(dim=-1)
            best = answers[log_p.gather(2, answers[..., None]).sum(dim=(1, 2)).argmax()]
            assert torch.equal(model.generate(tokens, num_beams=4, max_new_tokens=2)[i], best)
