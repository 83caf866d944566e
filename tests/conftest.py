"""What every test has, a seed, and what many use: memory that shows when it is read unwritten, a compiler without a past."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.register_assert_rewrite("contract")  # so that its asserts show what they compared
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported, which no test does at its top


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make gpu-test"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def dynamo():
    """torch.compile without graphs of other tests, and none left to them."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poisoned_memory():
    """Fill what torch.empty returns with NaN, so that a lane nobody wrote reaches the result."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def data_cache(tmp_path, monkeypatch):
    """What `datasets` prepares goes into a folder of the test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
