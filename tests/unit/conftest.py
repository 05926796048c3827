"""What all unit tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for one another 50 times longer than tiny matrices take."""
    torch = sys.modules.get("torch")  # not imported here: most tests run without it
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
