"""Which carries stay kept while nobody knows how many steps there will be."""

from __future__ import annotations

from collections.abc import Iterable


class Thinning:
    """Keeps every n-th carry, about as many as the square root of all, or as their logarithm.

    ``"sqrt"`` doubles the distance between those that are kept when there are more than two of them
    for each step of a segment. ``"log"`` keeps two at each distance :math:`2^i` from the end.
    """

    def __init__(self, every: int | str) -> None:
        self.every = every
        self.spacing = every if isinstance(every, int) else 1

    def superfluous(self, step: int, kept: Iterable[int]) -> list[int]:
        """Return which carries to forget, now that the one before ``step`` is kept too."""
        kept = sorted(kept)
        if self.every == "log":
            return [s for s in kept if s < step and not self._stays(s, step)]
        if self.every == "sqrt" and len(kept) > 2 * self.spacing + 1:
            self.spacing *= 2
        return [s for s in kept if s < step and s % self.spacing]

    @staticmethod
    def _stays(step: int, last: int) -> bool:
        if step == 0:
            return True
        distance = 1
        while step % (2 * distance) == 0:
            distance *= 2
        return last - step <= 2 * distance

    def between(self, low: int, high: int) -> set[int]:
        """Return which carries to keep on the way from one to another that is needed."""
        if self.every != "log":
            return set(range(low + 1, high + 1))
        found = set()
        while high - low > 1:
            low = (low + high) // 2
            found.add(low)
        return {*found, high}
