"""Shared fixtures."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, max_examples=60
)
# A search: HYPOTHESIS_PROFILE=search pytest tests/test_properties.py
hypothesis.settings.register_profile(
    "search",
    deadline=None,
    max_examples=3000,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    """Four float64 images of 3x32x32."""
    return torch.randn(
        4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
