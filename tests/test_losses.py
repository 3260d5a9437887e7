import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minivlm.layers import TextConfig, VisionConfig
from minivlm.losses import CLIPLoss, backward_with_gradient_cache, sigmoid_loss, softmax_loss
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.testing import assert_gradient_reaches, assert_permutation_invariant, assert_same, assert_same_gradients

KINDS = ["softmax", "sigmoid"]


def unit(B, D, dtype=torch.float32):
    return F.normalize(torch.randn(B, D, dtype=dtype), dim=-1)


def features(B, D=6):
    """Two feature matrices and a scale, in float64."""
    return unit(B, D, torch.float64), unit(B, D, torch.float64), torch.tensor(12.5, dtype=torch.float64)


BIAS = torch.tensor(-3.0, dtype=torch.float64)


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation makes, backward included."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


class TestSoftmax:
    def test_by_hand(self):
        """Every image picks its text and every text its image: the mean surprise of all 2B picks."""
        images, texts, scale = features(5)
        z = [[float(scale * images[i] @ texts[j]) for j in range(5)] for i in range(5)]
        surprise = 0.0
        for i in range(5):
            surprise -= math.log(math.exp(z[i][i]) / sum(math.exp(z[i][j]) for j in range(5)))
            surprise -= math.log(math.exp(z[i][i]) / sum(math.exp(z[j][i]) for j in range(5)))
        assert softmax_loss(images, texts, scale).item() == pytest.approx(surprise / 10, rel=1e-12)

    def test_chance_is_the_logarithm_of_the_batch(self):
        same = unit(1, 6).expand(32, 6)
        assert softmax_loss(same, same, torch.tensor(10.0)).item() == pytest.approx(math.log(32), rel=1e-5)

    def test_perfect_pairs_cost_nothing(self):
        assert softmax_loss(torch.eye(6), torch.eye(6), torch.tensor(100.0)).item() == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("B", [1, 2, 7, 12])
    @pytest.mark.parametrize("chunk", [1, 3, 4, 12, 100])
    def test_chunked_is_plain_in_value_and_gradient(self, B, chunk):
        assert_same_gradients(softmax_loss, lambda *x: softmax_loss(*x, chunk=chunk), features(B))

    def test_chunked_gradients_are_those_of_finite_differences(self):
        inputs = [x.requires_grad_() for x in features(5, 3)]
        assert torch.autograd.gradcheck(lambda *x: softmax_loss(*x, chunk=2), inputs)

    def test_chunked_survives_large_logits(self):
        images, texts, _ = features(7)
        scale = torch.tensor(1e4, dtype=torch.float64)
        assert_same_gradients(softmax_loss, lambda *x: softmax_loss(*x, chunk=2), [images, texts, scale])

    def test_a_second_derivative_of_the_chunked_loss_is_refused(self):
        inputs = [x.requires_grad_() for x in features(4)]
        (grad,) = torch.autograd.grad(softmax_loss(*inputs, chunk=2), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            grad.sum().backward()


class TestSmoothing:
    """A share of every label is spread over the whole batch: what `F.cross_entropy` calls label_smoothing."""

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_is_cross_entropy_with_softened_labels(self, chunk):
        loss = CLIPLoss(chunk=chunk, smoothing=0.1)

        def plain(images, texts):
            logits = loss.scale() * images @ texts.T
            own = torch.arange(len(images))
            return sum(F.cross_entropy(z, own, label_smoothing=0.1) for z in (logits, logits.T)) / 2

        assert_same_gradients(plain, loss, [unit(7, 6), unit(7, 6)])
        assert CLIPLoss(smoothing=0.0)(unit(7, 6), unit(7, 6)) >= 0

    @pytest.mark.parametrize(("kind", "smoothing"), [("softmax", 1.0), ("softmax", -0.1), ("sigmoid", 0.1)])
    def test_shares_that_make_no_sense(self, kind, smoothing):
        with pytest.raises(ValueError, match=f"smoothing is {smoothing}, but must be at least 0 and below 1"):
            CLIPLoss(kind, smoothing=smoothing)


class TestSigmoid:
    def test_by_hand(self):
        """Of each of B² pairs: is it true? The mean over the images of the summed surprise."""
        images, texts, scale = features(5)
        surprise = 0.0
        for i in range(5):
            for j in range(5):
                p = 1 / (1 + math.exp(-float(scale * images[i] @ texts[j] + BIAS)))
                surprise -= math.log(p if i == j else 1 - p)
        assert sigmoid_loss(images, texts, scale, BIAS).item() == pytest.approx(surprise / 5, rel=1e-12)

    @pytest.mark.parametrize("B", [1, 2, 7, 12])
    @pytest.mark.parametrize("chunk", [1, 3, 4, 12, 100])
    def test_chunked_is_plain_in_value_and_gradient(self, B, chunk):
        assert_same_gradients(sigmoid_loss, lambda *x: sigmoid_loss(*x, chunk=chunk), [*features(B), BIAS])


@pytest.mark.parametrize("kind", KINDS)
class TestBothKinds:
    def test_the_matrix_is_never_held(self, kind):
        """Neither in forward nor in backward, and what is kept between them is the inputs and a few vectors."""
        B, D, chunk = 96, 4, 8
        for loss_chunk, held in ((None, True), (chunk, False)):
            loss = CLIPLoss(kind, chunk=loss_chunk)
            images, texts = unit(B, D).requires_grad_(), unit(B, D).requires_grad_()
            kept = {}  # what waits for backward, each memory counted once

            def keep(t, kept=kept):
                kept[t.data_ptr()] = t.numel()
                return t

            with LargestTensor() as largest:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                    value = loss(images, texts)
                value.backward()
            assert (largest.numel >= B * B) == held
            assert (sum(kept.values()) >= B * B) == held
        assert largest.numel <= chunk * B

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_pairs_have_no_order(self, kind, chunk):
        loss = CLIPLoss(kind, chunk=chunk)
        pairs = torch.stack([unit(8, 6), unit(8, 6)])
        assert_permutation_invariant(lambda pairs: loss(*pairs), pairs, dim=1)

    def test_the_temperature_is_learnt(self, kind):
        for chunk in (None, 3):
            loss = CLIPLoss(kind, chunk=chunk)
            assert_gradient_reaches(loss(unit(8, 6), unit(8, 6)), loss)

    def test_a_few_steps_make_it_smaller(self, kind):
        loss = CLIPLoss(kind)
        images, texts = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8, 6))
        optimiser = torch.optim.Adam([images, texts, *loss.parameters()], lr=0.05)
        values = []
        for _ in range(60):
            value = loss(F.normalize(images, dim=-1), F.normalize(texts, dim=-1))
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            values.append(value.item())
        assert values[-1] < values[0] / 4

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_half_precision_around_it_costs_no_accuracy(self, kind, chunk):
        loss = CLIPLoss(kind, chunk=chunk, temperature=0.01)
        images, texts = unit(8, 6), unit(8, 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(images, texts), loss(images.clone(), texts))
            half = loss(images, texts), loss.logits(images, texts)
        assert torch.equal(half[0], loss(images, texts))
        assert torch.equal(half[1], loss.logits(images, texts))

    def test_features_in_half_precision_are_compared_in_full(self, kind):
        loss = CLIPLoss(kind)
        images, texts = unit(8, 6).bfloat16(), unit(8, 6).bfloat16()
        assert torch.equal(loss(images, texts), loss(images.float(), texts.float()))

    def test_logits_are_what_the_loss_judges(self, kind):
        loss, images, texts = CLIPLoss(kind), unit(8, 6), unit(8, 6)
        z = loss.logits(images, texts)
        if kind == "softmax":
            labels = torch.arange(8)
            expected = (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
        else:
            expected = F.binary_cross_entropy_with_logits(z, torch.eye(8), reduction="sum") / 8
        assert_same(loss(images, texts), expected)
        assert loss.logits(images, texts[:3]).shape == (8, 3)

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_vectors_of_any_length_are_scaled_to_unit_length(self, kind, chunk):
        loss = CLIPLoss(kind, chunk=chunk)
        vectors = 3 * torch.randn(8, 6), torch.randn(8, 6)
        unit_vectors = [F.normalize(x, dim=-1) for x in vectors]
        normalised = lambda *vectors: loss(*(F.normalize(x, dim=-1) for x in vectors))
        assert_same_gradients(loss, normalised, list(vectors))
        assert_same(loss.logits(*vectors), loss.logits(*unit_vectors))

    def test_vectors_of_unit_length_are_compared_as_they_are(self, kind):
        loss, images, texts = CLIPLoss(kind).eval(), unit(64, 48), unit(64, 48)
        plain = softmax_loss if kind == "softmax" else partial(sigmoid_loss, bias=loss.logit_bias)
        value = plain(images, texts, loss.scale())
        assert torch.equal(loss(images, texts), value)

    def test_a_vector_of_zeros_is_no_nan(self, kind):
        images = torch.zeros(8, 6, requires_grad=True)
        loss = CLIPLoss(kind)(images, unit(8, 6))
        loss.backward()
        assert loss.isfinite() and images.grad.isfinite().all()

    def test_shapes_that_do_not_match(self, kind):
        with pytest.raises(ValueError, match=r"one shape \(B, D\), not \(8, 6\) and \(7, 6\)"):
            CLIPLoss(kind)(unit(8, 6), unit(7, 6))


class TestTemperature:
    def test_starts_where_it_is_told(self):
        assert CLIPLoss().scale().item() == pytest.approx(1 / 0.07, rel=1e-5)
        sigmoid = CLIPLoss("sigmoid", temperature=0.1, bias=-10.0)
        assert sigmoid.scale().item() == pytest.approx(10, rel=1e-5)
        assert sigmoid.logit_bias.item() == -10

    def test_is_clamped_in_training(self):
        loss = CLIPLoss(temperature=1e-4)
        loss(unit(8, 6), unit(8, 6))
        assert loss.scale().item() == pytest.approx(100, rel=1e-5)

    def test_is_left_alone_below_the_limit_in_eval_mode_and_for_the_sigmoid(self):
        for loss in (
            CLIPLoss(temperature=0.02),
            CLIPLoss(temperature=1e-4).eval(),
            CLIPLoss("sigmoid", temperature=1e-4),
        ):
            before = loss.scale().item()
            loss(unit(8, 6), unit(8, 6))
            assert loss.scale().item() == before

    def test_a_clamped_temperature_still_learns(self):
        loss = CLIPLoss(temperature=1e-4)
        assert_gradient_reaches(loss(unit(8, 6), unit(8, 6)), loss)


def test_wrong_options():
    with pytest.raises(ValueError, match="unknown loss 'hinge'; there are softmax and sigmoid"):
        CLIPLoss("hinge")
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"chunk is {chunk}, but must be at least 1"):
            CLIPLoss(chunk=chunk)


class TestGradientCache:
    B = 7

    def clip(self, **options):
        vision = VisionConfig(width=16, depth=2, heads=2, image_size=8, patch_size=4)
        text = TextConfig(width=16, depth=2, heads=2, vocab_size=30, context=6, pool="argmax", causal=False)
        vision, text = (type(c)(**{**vars(c), **options}) for c in (vision, text))
        return CLIP(CLIPConfig(vision=vision, text=text, embed_width=12)).double()

    def batch(self):
        images = torch.randn(self.B, 3, 8, 8, dtype=torch.float64)
        tokens = torch.randint(1, 30, (self.B, 6))
        return images, tokens, torch.arange(6) < torch.randint(1, 7, (self.B, 1))

    @pytest.mark.parametrize("chunk", [1, 3, 7, 20])
    def test_is_the_direct_step(self, chunk):
        model, (images, tokens, mask) = self.clip(), self.batch()
        model(images, tokens, mask).loss.backward()
        direct = {name: p.grad for name, p in model.named_parameters()}
        loss = model(images, tokens, mask).loss.detach()
        model.zero_grad()
        value = backward_with_gradient_cache(
            (model.encode_image, model.encode_text), ((images,), (tokens, mask)), model.loss, chunk=chunk
        )
        assert_same(value, loss)
        for name, p in model.named_parameters():
            assert_same(p.grad, direct[name], name)

    def test_random_layers_see_the_same_numbers_in_both_passes(self):
        """With dropout the direct step is one that runs the same chunks, from the same random state, with a graph."""
        model, (images, tokens, mask), chunk = self.clip(dropout=0.3), self.batch(), 3
        encoders, inputs = (model.encode_image, model.encode_text), ((images,), (tokens, mask))
        torch.manual_seed(3)
        parts = [
            torch.cat([encode(*(t[i : i + chunk] for t in x)) for i in range(0, self.B, chunk)])
            for encode, x in zip(encoders, inputs, strict=True)
        ]
        after = torch.rand(1)
        loss = model.loss(*parts)
        loss.backward()
        direct = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        torch.manual_seed(3)
        value = backward_with_gradient_cache(encoders, inputs, model.loss, chunk=chunk)
        assert torch.equal(torch.rand(1), after)  # and the random state goes on as if there had been one pass
        assert_same(value, loss)
        for name, p in model.named_parameters():
            assert_same(p.grad, direct[name], name)

    def test_works_with_the_chunked_loss_and_accumulates(self):
        model, (images, tokens, mask) = self.clip(), self.batch()
        model(images, tokens, mask).loss.backward()
        direct = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.loss.chunk = 2
        backward_with_gradient_cache(
            (model.encode_image, model.encode_text), ((images,), (tokens, mask)), model.loss, chunk=3
        )
        for name, p in model.named_parameters():
            assert_same(p.grad, 2 * direct[name], name, tolerance=1e-6)  # the loss itself counts in fp32

    def test_under_autocast_all_parameters_learn(self):
        """Autocast remembers weights that were cast without a graph; the second pass must not meet those."""
        model, (images, tokens, mask) = self.clip().float(), self.batch()
        with torch.autocast("cpu", torch.bfloat16):
            backward_with_gradient_cache(
                (model.encode_image, model.encode_text), ((images.float(),), (tokens, mask)), model.loss, chunk=3
            )
        dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert dead == []

    def test_never_more_than_a_chunk_goes_through_an_encoder(self):
        seen = []
        weight = torch.randn(4, 4, requires_grad=True)

        def encode(x):
            seen.append(len(x))
            return F.normalize(x @ weight, dim=-1)

        x = torch.randn(self.B, 4)
        backward_with_gradient_cache((encode, encode), ((x,), (x,)), CLIPLoss(), chunk=3)
        assert sorted(seen) == sorted([3, 3, 1] * 4)  # both encoders, twice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unit_vectors_in_half_precision_are_compared_as_they_are(dtype):
    """Their lengths are 1 but for rounding: another division would change the loss of every training in bf16."""
    images, texts = (F.normalize(torch.randn(8, 16), dim=-1).to(dtype) for _ in range(2))
    loss = CLIPLoss()
    assert torch.equal(loss.logits(images, texts), loss.scale() * images.float() @ texts.float().T)
