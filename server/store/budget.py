"""How much of the disk the store's own copies of adapters take, and how much they may."""

from collections.abc import Mapping

from .errors import StoreFull


class DiskBudget:
    """Counts contents by digest; belongs to the event loop's thread.

    Args:
        limit: Bytes that they may take together; None for any number.
    """

    def __init__(self, limit: int | None) -> None:
        """Start with no content."""
        self._limit = limit
        self._sizes: dict[str, int] = {}
        self._taken = 0

    @property
    def taken(self) -> int:
        """Bytes of all contents."""
        return self._taken

    @property
    def digests(self) -> frozenset[str]:
        """Of all contents."""
        return frozenset(self._sizes)

    def count(self, sizes: Mapping[str, int]) -> None:
        """Take in contents that are there, whatever they take."""
        for digest, size in sizes.items():
            self.release(digest)
            self._sizes[digest] = size
            self._taken += size

    def has_room(self, digest: str, size: int) -> bool:
        """Whether a content is counted or fits."""
        return digest in self._sizes or self._limit is None or self._taken + size <= self._limit

    def reserve(self, digest: str, size: int) -> None:
        """Count a content that is about to be there.

        Raises:
            StoreFull: It does not fit.
        """
        if not self.has_room(digest, size):
            raise StoreFull(
                f"there is no room for {size} bytes more: the store has {self._taken} of the"
                f" {self._limit} that --store-budget allows. Remove adapters, keep fewer"
                " --adapter-versions, or raise it"
            )
        if digest not in self._sizes:
            self.count({digest: size})

    def release(self, digest: str) -> None:
        """Forget a content, counted or not."""
        self._taken -= self._sizes.pop(digest, 0)
