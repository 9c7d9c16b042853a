"""One thread: small operations on several OpenMP threads are far slower on a busy machine, and not repeatable."""

import pytest
import torch

from training.machine import configure_threads


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    configure_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
