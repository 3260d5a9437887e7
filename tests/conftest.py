import pytest
import torch

# Tensors are tiny here, so a second thread gains nothing, and on a busy machine threads that spin at each other's barriers
# cost a lot: a test of 1.3 s was seen to take 139 s.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    """Every test starts from one random state, so that none depends on which ran before it."""
    torch.manual_seed(0)
