"""Parity tests hold our numbers against those of the published implementations, where these are installed."""

import pytest
import torch

import minivlm._torchvision  # noqa: F401  the references import torchvision, which may need what is declared there


@pytest.fixture
def images():
    """(n, size) → random pixels (n, 3, size, size)"""
    return lambda n, size: torch.randn(n, 3, size, size)


@pytest.fixture
def close():
    """Asserts that two tensors agree to 1e-5 of the largest number."""

    def check(ours, theirs):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()

    return check
