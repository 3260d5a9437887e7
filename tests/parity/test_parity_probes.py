"""The linear probe against scikit-learn's LogisticRegression, and the 80 templates against open_clip's."""

import numpy as np
import pytest
import torch

from minivlm.metrics.probes import choose_strength, fit_linear_probe
from minivlm.tasks.templates import TEMPLATE_SETS

linear_model = pytest.importorskip(
    "sklearn.linear_model", reason="scikit-learn is not installed (tests/requirements.txt)"
)


def data(n, C, D, seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(C, D)) * rng.uniform(0.1, 3, D)
    labels = rng.integers(0, C, n)
    return centres[labels] + 2 * rng.normal(size=(n, D)) * rng.uniform(0.1, 3, D) + 5, labels


def objective(x, labels, weight, bias, strength):
    logits = x @ weight.T + bias
    top = logits.max(axis=1, keepdims=True)
    surprise = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0] - logits[np.arange(len(x)), labels]
    return surprise.sum() + strength / 2 * (weight**2).sum()


@pytest.mark.parametrize("strength", [0.1, 1.0, 1e3])
@pytest.mark.parametrize("C", [3, 11])
def test_the_linear_probe_is_the_logistic_regression_of_scikit_learn(strength, C):
    x, labels = data(240, C, 12, seed=C)
    others, _ = data(300, C, 12, seed=C)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    standard = (x - mean) / deviation
    theirs = linear_model.LogisticRegression(C=1 / strength, max_iter=20_000, tol=1e-10).fit(standard, labels)
    ours = fit_linear_probe(torch.tensor(x), torch.tensor(labels), classes=C, strength=strength, tolerance=1e-9)
    values = [
        objective(standard, labels, weight, bias, strength)
        for weight, bias in ((ours.weight.numpy(), ours.bias.numpy()), (theirs.coef_, theirs.intercept_))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert ours.loss * len(x) == pytest.approx(values[0], rel=1e-9)
    logits = ours(torch.tensor(others))
    assert (logits.argmax(dim=1).numpy() == theirs.predict((others - mean) / deviation)).all()
    np.testing.assert_allclose(
        logits.softmax(dim=1).numpy(), theirs.predict_proba((others - mean) / deviation), atol=1e-3
    )


def test_two_classes_and_the_default_tolerance_give_its_predictions():
    x, labels = data(200, 2, 6, seed=5)
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    # With two classes scikit-learn has one vector w in place of two, of which each is w / 2: half the penalty.
    theirs = linear_model.LogisticRegression(C=2.0, max_iter=1000).fit(standard, labels)
    ours = fit_linear_probe(torch.tensor(x), torch.tensor(labels), classes=2, strength=1.0)
    assert (ours(torch.tensor(x)).argmax(dim=1).numpy() == theirs.predict(standard)).all()


def test_the_strength_is_as_good_as_the_best_of_a_full_grid():
    """CLIP's §A.3 tries a few of the 97 strengths; the best of them is no better on the validation part."""
    x, labels = data(150, 4, 8, seed=1)
    val, val_labels = x[90:], labels[90:]
    tensors = [torch.tensor(one) for one in (x[:90], labels[:90], val, val_labels)]
    found = choose_strength(*tensors, classes=4)

    def right(strength):
        probe = fit_linear_probe(*tensors[:2], classes=4, strength=strength)
        return (probe(tensors[2]).argmax(dim=1) == tensors[3]).double().mean().item()

    assert right(found) >= max(right(10**log) for log in np.linspace(-6, 6, 13)) - 2 / 60


def test_the_80_templates_are_those_of_open_clip():
    metadata = pytest.importorskip("open_clip.zero_shot_metadata", reason="open_clip is not installed")
    theirs = [template("{}") for template in metadata.OPENAI_IMAGENET_TEMPLATES]
    assert list(TEMPLATE_SETS["imagenet"]) == theirs
