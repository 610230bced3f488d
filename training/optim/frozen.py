"""What `config.optim.freeze` freezes besides parameters: batch normalization, which then no longer sees the batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import models
from training.optim.patterns import Shaped, matches, per_layer


def training_graph(
    graph: models.Graph, params: Mapping[str, Shaped], state: Mapping[str, Shaped], patterns: Sequence[str]
) -> tuple[models.Graph, dict[str, np.ndarray]]:
    """The graph to train with, whose frozen batch normalizations use, and keep, their running statistics.

    One is frozen if all of its parameters are, or if it has none and its statistics are named by a pattern.

    Args:
        graph, params, state: of the split model; shapes are enough.
        patterns: of `config.optim.freeze`, over unrolled names.

    Returns:
        The graph, and the state that it has besides that of the model, by name: where only some layers of a scanned
        stack are frozen, which of them. It never changes and is no part of a checkpoint.

    Raises:
        ValueError: batch statistics that cannot be frozen.
    """
    if not patterns:
        return graph, {}
    model = models.merge(graph, params, state)

    def frozen(name: str, leaf: Any) -> np.ndarray:
        return per_layer(name, leaf, lambda one: any(matches(pattern, one) for pattern in patterns))

    try:
        models.freeze_statistics(model, frozen)
    except ValueError as error:
        raise ValueError(f"config.optim.freeze={tuple(patterns)}: {error}") from None
    graph, _, flags = models.split(model)
    return graph, {name: np.asarray(value) for name, value in flags.items() if name not in state}
