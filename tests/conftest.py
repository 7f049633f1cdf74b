"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Handing tensors as small as the tests' to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code, and no recompile budget spent, by the test before."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """For a module: `pytestmark = pytest.mark.usefixtures("no_gradients")`."""
    with torch.no_grad():
        yield
