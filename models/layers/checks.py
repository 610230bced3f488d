"""What layers ask of the array that they are given, each in one line."""

from jaxtyping import Array, Float


def check_map(layer: str, x: Float[Array, "B Y X C"], channels: int) -> None:
    """ValueError for what is no batch of maps of so many channels."""
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(
            f"a {layer} for {channels} channels is given {tuple(x.shape)}; allowed: maps (batch, rows, columns, "
            f"{channels})"
        )


def check_channels(layer: str, x: Float[Array, "... C"], channels: int) -> None:
    """ValueError for another last axis; one of length 1 would be repeated without a word."""
    if not x.ndim or x.shape[-1] != channels:
        raise ValueError(f"a {layer} for {channels} channels is given {tuple(x.shape)}; allowed: (..., {channels})")
