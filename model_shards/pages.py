"""Which pages of a pool are free, and how many have each of the others.

Rule: whoever has a page that others have, too, reads it only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Pages:
    """The pages 0 … num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free page; from now on it has one owner."""
        page = self._free.pop()
        self._num_owners[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """They have one owner more."""
        for page in pages:
            self._num_owners[page] += 1

    def give_back(self, page: int) -> None:
        """It has one owner less; without any it is free."""
        self._num_owners[page] -= 1
        if not self._num_owners[page]:
            self._free.append(page)

    def shared(self, pages: Sequence[int], first: int) -> list[int]:
        """Where in `pages`, from index `first` on, stand some that have several owners."""
        return [index for index in range(first, len(pages)) if self._num_owners[pages[index]] > 1]
