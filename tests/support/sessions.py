"""Sessions as tests write them: their sources' fields beside the others."""

from typing import Any

from graph.chunk import SessionId
from stages.session import Media, Session

MEDIA = ("views", "heard", "fps", "max_pixels")


def make_session(name: str, source: str = "test://pattern", **fields: Any) -> Session:
    """One that sees and hears `source`, unless `views` says what it sees."""
    media = {field: fields.pop(field) for field in MEDIA if field in fields}
    return Session(SessionId(name), name, Media(**media) if "views" in media else Media.of(source, **media), **fields)
