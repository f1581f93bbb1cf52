from typing import Any


class ProcessCollector:
    def __init__(self, *_: Any, **__: Any) -> None: ...
