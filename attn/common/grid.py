"""Where the tokens of a sequence sit: some prefix tokens, then a grid in row-major order."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Grid:
    """Layout of the token axis: `prefix` tokens without a place (class, registers), then `shape` in row-major order.

    Examples:
      >>> Grid(shape=(14, 14), prefix=1).tokens
      197
    """

    shape: tuple[int, ...]
    prefix: int = 0

    @property
    def places(self) -> int:
        """Number of grid tokens, prefix not counted."""
        return math.prod(self.shape)

    @property
    def tokens(self) -> int:
        """Length of the token axis."""
        return self.prefix + self.places
