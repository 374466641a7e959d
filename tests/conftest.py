"""Every session that a test makes by scanning or tracing follows the schema and can be read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gradscope.session import Session


@pytest.fixture(scope="session", autouse=True)
def sessions_made() -> Iterator[list[Session]]:
    """Collect the sessions that are made, also by fixtures of modules."""
    sessions: list[Session] = []
    original = Session.__init__

    def collecting(self: Session, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        sessions.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", collecting)
        yield sessions


@pytest.fixture
def pretended_cuda() -> None:
    """Skip where a parameter on a pretended CUDA device ends the process."""
    import torch

    from gradscope.tracing.older_torch import PRETENDS_CUDA

    if torch.__version__ < PRETENDS_CUDA and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} cannot pretend CUDA without a GPU")


@pytest.fixture(autouse=True)
def _sessions_can_be_read_back(sessions_made: list[Session]) -> Iterator[None]:
    yield
    finished = [session for session in sessions_made if session.tool]  # those made by hand in a test have none
    sessions_made.clear()
    for session in finished:
        data = session.to_dict()
        assert Session.from_dict(data).to_dict() == data
    sessions_made.clear()
