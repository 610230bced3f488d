"""A model as one function in a file that JAX alone can load: no class, no configuration and no weights beside it."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export

from models.core.errors import unknown_name
from models.core.state import merge, split

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH = "batch"
Inputs = Sequence[int] | jax.ShapeDtypeStruct | Mapping[str, jax.ShapeDtypeStruct]
MOST_BYTES = 2**31 - 2**24  # a serialized function is one flatbuffer, below 2 GiB


def export_inference(
    model: nnx.Module,
    inputs: Inputs,
    platforms: Sequence[str] = PLATFORMS,
    *,
    call: Callable[[nnx.Module, Any], Any] | None = None,
) -> export.Exported:
    """`logits = model(images)` as StableHLO, for any number of images, or `answers = call(model, inputs)` for any
    number of examples.

    The weights are constants of the function, so its serialized form is complete: it is as large as they are. It does
    not say where the code lay that it was made from.

        function = jax.export.deserialize(export_inference(model, (224, 224, 3)).serialize())
        logits = function.call(images)  # float32 [B, 224, 224, 3], normalized as in training

    Args:
      model: evaluated as by `model(images)`, in the dtype of its computation; its arrays may be on any devices of this
        process.
      inputs: (height, width, channels) of images, or what `call` takes: an array, or arrays by name, whose first axis
        is that of the examples. All other axes are fixed.
      platforms: any of `PLATFORMS`; the function is lowered for each, whatever devices are here.
      call: how the model is called with what is given.

    Raises:
      ValueError: the shape or a platform is impossible, the model has shapes in place of weights or too many of them
        for one file, or something in it has no form that can be stored for these platforms and any batch; one line.
    """
    if not platforms:
        raise ValueError(f"platforms: name at least one of {', '.join(PLATFORMS)}")
    for platform in platforms:
        if platform not in PLATFORMS:
            raise ValueError(unknown_name("platform", platform, PLATFORMS))
    answers, given = inference(model, inputs, call)
    try:
        with _without_places():
            return export.export(jax.jit(answers), platforms=tuple(platforms))(given)
    except (jax.errors.InconclusiveDimensionOperation, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the model cannot be exported for {', '.join(platforms)} and any batch: {reason}") from error


def inference(
    model: nnx.Module, inputs: Inputs, call: Callable[[nnx.Module, Any], Any] | None
) -> tuple[Callable[[Any], Any], Any]:
    """The function that is exported, which has the weights in it, and what it takes for any batch; see
    `export_inference`.
    """
    (batch,) = export.symbolic_shape(BATCH)
    given: Any
    if isinstance(inputs, Mapping):
        given = {name: jax.ShapeDtypeStruct((batch, *spec.shape[1:]), spec.dtype) for name, spec in inputs.items()}
    elif isinstance(inputs, jax.ShapeDtypeStruct):
        given = jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    else:
        shape = tuple(inputs)
        if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"inputs={shape}: takes (height, width, channels), all positive")
        given = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    graph, params, state = split(model)
    leaves = {**params, **state}
    if abstract := [name for name, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)]:
        raise ValueError(f"a model without weights cannot be exported: {abstract[0]} is only a shape")
    if (total := sum(leaf.nbytes for leaf in leaves.values())) > MOST_BYTES:
        raise ValueError(
            f"the weights take {total / 2**30:.2f} GiB, a function with its weights in one file at most "
            f"{MOST_BYTES / 2**30:.2f} GiB"
        )
    # As host arrays they belong to no device, so the function can run on any.
    params, state = ({name: np.asarray(leaf) for name, leaf in part.items()} for part in (params, state))

    def answers(given: Any) -> Any:
        made: Any = merge(graph, params, state)
        return made(given) if call is None else call(made, given)

    return answers, given


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Programs lowered inside do not name the files of their source, which are paths of the disk that has them."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
