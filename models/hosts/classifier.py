"""What every image classifier has in common: what it is called with, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from attn import Grid
from attn.core.masks import as_mask
from models.core.call import Call
from models.core.options import pair
from models.core.watch import Watch
from models.hosts.host import Host
from models.hosts.images import checked_images
from models.hosts.options import ClassifierOptions
from models.layers.linear import DType, computed


class Classifier(Host):
    """A model from images to logits. A host says in `run` what it computes.

    Attributes:
      Options: what it is made of; the constructor takes one of them, and `rngs`.
      options: that one.
    """

    Options: ClassVar[type[ClassifierOptions]] = ClassifierOptions
    options: ClassifierOptions
    dtype: DType

    def __call__(
        self,
        images: Float[Array, "B Y X I"],
        *,
        train: bool = False,
        key: PRNGKeyArray | None = None,
        tap: Any = None,
        mask: Any = None,
    ) -> Any:
        """Logits `[B, K]` in float32 (pooled features `[B, C]` if there is no head).

        Args:
          images: floating point, NHWC.
          train: with noise, which needs a key, and batch statistics that move.
          tap: what looks in (`models/core/taps.py`).
          mask: which tokens see which (`attn.Mask`), for mechanisms that take one.

        Raises:
          ValueError: images of another kind; a tap that meets no site; one line.
        """
        given = (images, key, None if mask is None else as_mask(mask))
        return self.called("traced", given, tap, layers=(), only_answer=True, train=train)

    def features(
        self,
        images: Float[Array, "B Y X I"],
        *,
        layers: Sequence[int] = (),
        train: bool = False,
        key: PRNGKeyArray | None = None,
        tap: Any = None,
        mask: Any = None,
    ) -> dict[str, Array]:
        """Named intermediates: `"embedded"` before the blocks, chosen layers by the names of their parameters
        (`"blocks.3"`), `"tokens"` after the final norm, `"pooled"`, `"logits"`, and what else a host has.

        Args:
          layers: numbers through the model, negative ones from the end.
        """
        given = (images, key, None if mask is None else as_mask(mask))
        return self.called("traced", given, tap, layers=tuple(layers), only_answer=False, train=train)

    def run(self, images: Float[Array, "B Y X I"], call: Call, layers: Sequence[int]) -> dict[str, Array]:
        """Named intermediates of images in the dtype of the computation."""
        raise NotImplementedError

    def answer(self, outputs: Mapping[str, Array], train: bool) -> Any:
        """What a call gives, of the named intermediates."""
        return outputs["logits" if "logits" in outputs else "pooled"]

    def inputs(self, batch: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what the model is called with."""
        shape = (batch, *pair(self.options.image_size), self.options.channels)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)

    def traced(
        self,
        images: Any,
        key: Any,
        mask: Any,
        watch: Watch | None,
        *,
        layers: tuple[int, ...],
        only_answer: bool,
        train: bool,
    ) -> Any:
        """One forward pass; see `__call__` and `features`.

        For an empty batch it is one of a blank image, whose results are left out: nobody inside has to think of it.
        """
        images = checked_images(images, self.options.channels)
        if images.shape[0] == 0:
            if train or watch is not None:
                raise ValueError("a batch without images, in training or with a tap; allowed: at least one")
            blank = jnp.zeros((1, *images.shape[1:]), images.dtype)
            options: dict[str, Any] = {"layers": layers, "only_answer": only_answer, "train": train}
            return jax.tree.map(lambda x: x[:0], self.traced(blank, key, mask, watch, **options))
        images = images.astype(computed(self.dtype))
        outputs = self.run(images, Call(Grid(()), train=train, key=key, mask=mask, tap=watch), layers)
        return self.answer(outputs, train) if only_answer else outputs
