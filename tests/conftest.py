"""One thread for every test: the tensors are small, and on a busy machine threads wait for each other longer than they
work."""

import pytest
import torch
from models import Calls

torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the kernels are asked to do during the test."""
    return Calls(monkeypatch)
