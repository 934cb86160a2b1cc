"""stream.py: the order in which problems are taken, for ever.

The problem set is shuffled again for each epoch by (seed, epoch), even if an epoch ends in the
middle of a batch. Two counters are the whole state, so a checkpoint has only these.

    python -m pytest tests/runtime/test_stream.py
"""

import random
from dataclasses import dataclass


@dataclass
class ProblemStream:
    """Indices 0..size-1 for ever, shuffled for each epoch by (seed, epoch). Two counters are the
    whole state."""

    size: int
    seed: int = 0
    epoch: int = 0
    position: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError("the problem set is empty")
        # if resumed with a smaller set, take() would never reach its end
        if not 0 <= self.position < self.size:
            raise ValueError(
                f"position {self.position} is outside the set of {self.size}: another set than"
                " saved?"
            )

    def take(self, count: int) -> list[int]:
        """The next `count` indices. If an epoch ends in the middle of a batch, the next epoch
        follows."""
        taken: list[int] = []
        while len(taken) < count:
            order = list(range(self.size))
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
            part = order[self.position : self.position + count - len(taken)]
            taken += part
            self.position += len(part)
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
        return taken
