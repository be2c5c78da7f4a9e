"""Settings and fixtures for all tests."""

import copy
import os
import tempfile
from pathlib import Path

import pytest

try:
    import torch
except ModuleNotFoundError:  # the core's tests run without it
    pass
else:
    # The models here are tiny: a second thread brings nothing, and where other processes keep the
    # machine busy, waiting for it makes the tests many times slower.
    torch.set_num_threads(1)

TINY_MODEL = Path(__file__).parent / "tiny" / "model"


@pytest.fixture(scope="session")
def _loaded_tiny_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()


@pytest.fixture
def tiny_model(_loaded_tiny_model):
    """The tiny trained language model of `tests/tiny`, float32, a fresh copy for each test."""
    return copy.deepcopy(_loaded_tiny_model)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture
def memory_folder():
    """A place for many small runs, in memory where that exists: there fsync costs nothing."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        yield Path(place)
