"""Every test starts from the same seed, and must leave Pyro's global state as it found it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts: small tensors gain nothing from threads, which
# wait for each other where other programs run; the runs that tests start inherit it

import pyro
import pytest
import torch
from torch.distributions import Distribution


@pytest.fixture(autouse=True)
def clean_state():
    torch.manual_seed(0)
    before = (Distribution._validate_args, torch.get_default_dtype())
    yield
    assert not list(pyro.get_param_store().keys()), "something was left in Pyro's parameter store"
    assert (Distribution._validate_args, torch.get_default_dtype()) == before, "a global setting was changed"
