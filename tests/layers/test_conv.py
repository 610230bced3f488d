"""Convolutions against loops over places in float64: sizes, strides, dilations, paddings and groups, both ways."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowering import lowered

from models.layers.conv import Conv
from models.layers.depthwise import MOST

NORMAL = jax.nn.initializers.normal(1.0)


def definition(x, kernel, *, stride, dilation, pads, groups):
    """One place after the other: the sum over the entries of the kernel and the channels of a group."""
    x, kernel = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0))), np.asarray(kernel, np.float64)
    rows, columns, inside, outputs = kernel.shape
    counts = [
        (side - step * (size - 1) - 1) // by + 1
        for side, size, step, by in zip(x.shape[1:3], (rows, columns), dilation, stride, strict=True)
    ]
    y = np.zeros((len(x), *counts, outputs))
    for v, u, k, l in itertools.product(*map(range, (*counts, rows, columns))):
        pixel = x[:, v * stride[0] + k * dilation[0], u * stride[1] + l * dilation[1]]
        for output in range(outputs):
            first = output // (outputs // groups) * inside
            y[:, v, u, output] += pixel[:, first : first + inside] @ kernel[k, l, :, output]
    return y


def both(value):
    return (value, value) if isinstance(value, int) else value


def torch_pads(padding, size, dilation, shape, stride):
    """Zeros before and after, from the documents of PyTorch and TensorFlow."""
    if padding == "same":
        totals = [
            max((-(-side // by) - 1) * by + step * (n - 1) + 1 - side, 0)
            for side, n, step, by in zip(shape, size, dilation, stride, strict=True)
        ]
        return [(total // 2, total - total // 2) for total in totals]
    if padding in ("centred", "valid"):
        return [
            (step * (n // 2),) * 2 if padding == "centred" else (0, 0) for n, step in zip(size, dilation, strict=True)
        ]
    return [both(one) for one in both(padding)]


CASES = {
    "square": dict(size=3),
    "plain number of zeros": dict(size=3, padding=2),
    "a row": dict(size=(1, 5), padding="centred"),
    "a column with a stride": dict(size=(5, 1), stride=(2, 1)),
    "dilated": dict(size=3, dilation=2),
    "dilated along columns": dict(size=(3, 2), dilation=(1, 3), stride=(1, 2), padding="valid"),
    "same": dict(size=(4, 3), stride=(3, 2), dilation=(1, 2), padding="same"),
    "even": dict(size=2, padding="centred"),
    "even, dilated": dict(size=(2, 4), dilation=2, padding="centred"),
    "rows and columns": dict(size=3, padding=(0, 2)),
    "before and after": dict(size=(2, 3), stride=2, padding=((1, 0), (0, 3))),
    "one entry": dict(size=1, stride=(3, 2), padding="valid"),
    "a stride that skips": dict(size=(1, 2), stride=4, padding="valid"),
}
GROUPS = {"dense": (6, 4, 1), "groups": (6, 4, 2), "depthwise": (6, 6, 6), "twice as many": (3, 6, 3)}


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_definition(case, groups):
    """The convolution is linear in both inputs, so its gradients are right if they are along a random direction."""
    channels, width, count = GROUPS[groups]
    layer = Conv(channels, width, groups=count, kernel_init=NORMAL, rngs=nnx.Rngs(0), **CASES[case])
    options = {"padding": "centred", "stride": 1, "dilation": 1} | CASES[case]
    options = options | {name: both(options[name]) for name in ("size", "stride", "dilation")}
    assert layer.kernel.shape == (*options["size"], channels // count, width)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, 12, channels)).astype(np.float32)
    pads = torch_pads(options["padding"], options["size"], options["dilation"], x.shape[1:3], options["stride"])
    of = {name: options[name] for name in ("stride", "dilation")} | {"pads": pads, "groups": count}
    graph, params = nnx.split(layer)
    y, pullback = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, jnp.asarray(x))
    kernel = np.asarray(layer.kernel[...])
    expected = definition(x, kernel, **of)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    g = rng.normal(size=y.shape).astype(np.float32)
    d_params, d_x = pullback(g)
    for gradient, inputs in (
        (d_x, (rng.normal(size=x.shape), kernel)),
        (d_params.kernel[...], (x, rng.normal(size=kernel.shape))),
    ):
        direction = inputs[0] if gradient.shape == x.shape else inputs[1]
        along = (g * definition(*inputs, **of)).sum()
        np.testing.assert_allclose((np.asarray(gradient, np.float64) * direction).sum(), along, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(d_params.bias[...], g.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(size=(1, 7), stride=(1, 2)), dict(size=3, dilation=(2, 1)), dict(size=7)])
def test_depthwise_kernels_of_every_shape_are_shifted_maps_on_a_cpu(options):
    layer = Conv(4, 4, groups=4, kernel_init=NORMAL, rngs=nnx.Rngs(0), **options)
    graph, params = nnx.split(layer)

    def gradients(params, x):
        return jax.grad(lambda params, x: nnx.merge(graph, params)(x).sum(), (0, 1))(params, x)

    x = jnp.ones((1, 16, 16, 4))
    assert "stablehlo.convolution" not in lowered(gradients, "cpu", params, x)
    assert "stablehlo.convolution" in lowered(gradients, "tpu", params, x)


def test_a_large_depthwise_kernel_is_left_to_the_compiler():
    layer = Conv(4, 4, size=(MOST + 1, 1), groups=4, kernel_init=NORMAL, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    text = lowered(lambda params, x: nnx.merge(graph, params)(x), "cpu", params, jnp.ones((1, 8, 8, 4)))
    assert "stablehlo.convolution" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(groups=4), "groups=4 of a convolution: must divide 6 channels and 8 outputs"),
        (dict(groups=3), "groups=3 of a convolution: must divide 6 channels and 8 outputs"),
        (dict(groups=0), "groups=0 of a convolution"),
        (dict(size=0), "size=0; allowed: an integer of at least 1, or a tuple of 2"),
        (dict(size=(3, 3, 3)), r"size=\(3, 3, 3\) has 3 entries for 2 axes"),
        (dict(stride=(1, 0)), r"stride=\(1, 0\); allowed: an integer of at least 1"),
        (dict(dilation=0), "dilation=0; allowed: an integer of at least 1"),
        (dict(dilation=1.5), "dilation=1.5; allowed: an integer of at least 1"),
        (dict(padding="centered"), "unknown padding of a convolution 'centered'; nearest: centred"),
        (dict(padding=-1), "padding=-1 of a convolution; allowed: centred, valid, same, a number of at least 0"),
        (dict(padding=(1, 2, 3)), r"padding=\(1, 2, 3\) of a convolution; allowed: centred"),
        (dict(padding=None), "padding=None of a convolution; allowed: centred"),
    ],
    ids=str,
)
def test_what_means_nothing_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Conv(6, 8, **{"size": 3, **options}, kernel_init=NORMAL, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (2, 5, 5, 4),
            r"a convolution for 6 channels is given \(2, 5, 5, 4\); allowed: maps \(batch, rows, columns, 6\)",
        ),
        ((5, 5, 6), r"a convolution for 6 channels is given \(5, 5, 6\)"),
        ((2, 3, 5, 6), r"a map of 3 x 5 with zeros of \(\(0, 0\), \(0, 0\)\) around it is smaller than a convolution"),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_map_that_does_not_fit_is_one_line(shape, message, groups):
    layer = Conv(
        6, 6, size=(2, 3), dilation=(3, 1), padding="valid", groups=groups, kernel_init=NORMAL, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=message) as error:
        layer(jnp.ones(shape))
    assert "\n" not in str(error.value)
