import os

import pytest
import torch

from alora_kernels import once

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def _fresh_warnings():
    """Warnings that come once come once in each test."""
    once.forget()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_environment():
    """TrainingArguments(bf16=True) of transformers 4 tells the whole process by a variable."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def seed(request):
    """A fresh seed, printed so that a failure can be repeated."""
    value = int(torch.randint(1 << 30, ()))
    print(f"seed={value}")
    return value
