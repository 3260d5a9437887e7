"""Parity tests hold our numbers against those of the published implementations, where these are installed."""

import pytest
import torch

import minivlm._torchvision  # noqa: F401  the references import torchvision, which may need what is declared there


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def images():
    """(n, size) → random pixels (n, 3, size, size)"""
    return lambda n, size: torch.randn(n, 3, size, size)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture
def close():
    """Asserts that two tensors agree to 1e-5 of the largest number."""

    def check(ours, theirs, tolerance=1e-5):
        assert relative_error(ours.float(), theirs.float()) < tolerance

    return check
