"""Which of several losses trains which parameter."""

from collections.abc import Mapping

import numpy as np

from tasks.losses import Loss, check_names
from training.optim.patterns import Shaped, select, unrolled


def of_losses(
    losses: Mapping[str, Loss], params: Mapping[str, Shaped], free: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """`{loss: {leaf: bool [] or [L]}}`: what each loss trains, without what is frozen.

    Args:
        losses: by name.
        params: leaves with shapes, by name.
        free: which of them are not frozen, `{leaf: bool [] or [L]}`; those that are need no loss.

    Raises:
        ValueError: a pattern that matches nothing, or a parameter that two losses train, or none.
    """
    check_names(losses)
    claimed = {name: select(f"losses.{name}", (loss.parameters,), params) for name, loss in losses.items()}
    for leaf, value in params.items():
        for place, one in enumerate(unrolled(leaf, value)):
            by = [name for name, masks in claimed.items() if np.atleast_1d(masks[leaf])[place]]
            if len(by) > 1:
                raise ValueError(f"losses: {one} is trained by {by[0]!r} and {by[1]!r}; each parameter by one loss")
            if not by and np.atleast_1d(free[leaf])[place]:
                raise ValueError(
                    f"losses: no loss trains {one}; there are "
                    f"{', '.join(f'{name!r} ({loss.parameters})' for name, loss in losses.items())}, and what "
                    "config.optim.freeze names needs none"
                )
    return {name: {leaf: mask & free[leaf] for leaf, mask in masks.items()} for name, masks in claimed.items()}
