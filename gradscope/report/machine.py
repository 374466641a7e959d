"""The session as JSON, for machines."""

from __future__ import annotations

import json

from gradscope.session import Session


def render(session: Session, *, full: bool = False) -> str:
    """Return the session as one JSON document (schema ``gradscope.session/1``)."""
    return json.dumps(session.to_dict(), indent=1) + "\n"
