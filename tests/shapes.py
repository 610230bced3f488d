"""Full-size models as shapes only, each made once for all tests of a process."""

import functools
import math

from flax import nnx

import models


def full_size(name, **options):
    """A variant without numbers, which nobody changes."""
    return _made(name, tuple((key, _fixed(value)) for key, value in sorted(options.items())))


@functools.cache
def _made(name, options):
    return nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **dict(options)))


def _fixed(value):
    return tuple(map(_fixed, value)) if isinstance(value, list | tuple) else value


def count(model):
    """Its parameters."""
    return sum(math.prod(value.shape) for value in models.split(model)[1].values())
