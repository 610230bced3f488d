"""The TPU kernels of outlook attention: interpreted on the CPU, and compiled by the TPU's own compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreting import interpreted

import attn
from attn.outlook import xla
from attn.outlook.api import OUTLOOK, Settings, outlook_attention
from benchmarks import outlook_sides, tpu_cycles
from kernels.outlook import oracle, tpu

NAMES = ("out", "d_logits", "d_v")
OPTIONS = {"window": 3, "stride": 2, "scale": 0.3}


def problem(rows, columns, heads=2, depth=16, batch=2, dtype=np.float32):
    """Logits, values and a cotangent, rounded to their dtype."""
    random = np.random.default_rng(0)
    shape = (batch, rows, columns, heads, depth)
    logits = random.standard_normal((batch, -(-rows // 2), -(-columns // 2), heads, 9, 9)) * 3
    return [np.asarray(x, dtype) for x in (logits, random.standard_normal(shape), random.standard_normal(shape))]


def results(implementation, arrays, *, compiled=True):
    def run(logits, v, d_out):
        return *implementation.forward(logits, v, **OPTIONS), *implementation.backward(logits, v, d_out, **OPTIONS)

    found = (jax.jit(run) if compiled else run)(*arrays)
    return {name: np.asarray(value) for name, value in zip(NAMES, found, strict=True)}


def errors(found, arrays):
    """Largest difference from the oracle, relative to the largest number there."""
    exact = results(oracle, [np.asarray(array, np.float64) for array in arrays], compiled=False)
    return {
        name: np.abs(value.astype(np.float64) - exact[name]).max() / np.abs(exact[name]).max()
        for name, value in found.items()
    }


@pytest.mark.parametrize(
    ("rows", "columns", "options"),
    [
        (4, 6, {}),
        (5, 7, {"heads": 3, "depth": 32}),  # odd sides: the last plane of odd places has zeros in the last window
        (1, 2, {}),  # one window
        (3, 1, {"batch": 1}),
        (22, 26, {"batch": 1, "heads": 1}),  # 143 windows: more than one vector of lanes, and the last is not full
    ],
)
def test_results_and_gradients_agree_with_the_oracle(rows, columns, options):
    arrays = problem(rows, columns, **options)
    assert tpu.refuse(*arrays[:2], window=3, stride=2) is None
    with interpreted():
        found = results(tpu, arrays)
    for name, error in errors(found, arrays).items():
        assert error <= 1e-6, f"{name} is off by {error}"  # NaN fails
    for name, error in errors(results(xla, arrays), arrays).items():
        assert error <= 1e-6, f"{name} is off by {error} without the kernel"


def test_bfloat16_loses_no_more_than_the_plain_path_does():
    arrays = problem(6, 5, dtype=jnp.bfloat16)
    with interpreted():
        found = results(tpu, arrays)
    assert all(value.dtype == jnp.bfloat16 for value in found.values())
    lost, plain = errors(found, arrays), errors(results(xla, arrays), arrays)
    for name, error in lost.items():
        # A loss may be small by luck: it counts as half a unit in the last place at least.
        assert error <= max(plain[name], 0.5 * float(jnp.finfo(jnp.bfloat16).eps)), name


def test_large_logits_do_not_overflow_and_examples_and_heads_are_apart():
    """NaN in one head of one example stays there; logits of a thousand have a softmax."""
    logits, v, d_out = problem(4, 5)
    logits = logits * 1000
    with interpreted():
        clean = results(tpu, [logits, v, d_out])
        v[0, :, :, 1] = np.nan
        found = results(tpu, [logits, v, d_out])
    for name in NAMES:
        assert np.isfinite(clean[name]).all(), name
        np.testing.assert_array_equal(found[name][1], clean[name][1], err_msg=name)
    for name, one in (("out", np.s_[0, :, :, 0]), ("d_logits", np.s_[0, :, :, 0]), ("d_v", np.s_[0])):
        np.testing.assert_array_equal(found[name][one], clean[name][one], err_msg=name)


def choice(shape=(2, 28, 28, 6, 32), dtype=jnp.bfloat16, *, window=3, stride=2, asked=()):
    batch, rows, columns, heads, _ = shape
    windows = (batch, -(-rows // stride), -(-columns // stride), heads, window**2, window**2)
    arrays = (jax.ShapeDtypeStruct(windows, dtype), jax.ShapeDtypeStruct(shape, dtype))
    return OUTLOOK.choose("tpu", arrays, Settings(window, stride, 0.3), asked)


@pytest.mark.smoke
def test_what_the_kernel_does_not_have_is_refused():
    for made in (choice(), choice((1, 64, 64, 12, 128)), choice(dtype=jnp.float32)):
        assert made.implementation == "tpu"
    for reason, made in {
        "float16": choice(dtype=jnp.float16),
        "no look at the maps": choice(asked=("look at the maps",)),
        "window=5": choice(window=5),
        "stride=1": choice(stride=1),
        "head dim 24": choice((1, 28, 28, 6, 24)),
        "1056 windows": choice((1, 64, 66, 6, 16)),
        "1024 windows of 256 channels": choice((1, 64, 64, 6, 256)),
    }.items():
        assert (made.implementation, made.fallback_from) == ("xla", "tpu")
        assert reason in made.refused["tpu"], made.refused


def test_the_operator_runs_the_kernel_forward_and_backward():
    logits, v, d_out = problem(4, 6)

    def loss(logits, v):
        return (outlook_attention(logits, v, implementation="tpu") * d_out).sum()

    calls = attn.explain(jax.grad(loss, argnums=(0, 1)), logits, v).calls
    assert {call.choices["tpu"].implementation for call in calls} == {"tpu"}


def test_mapped_over_examples_heads_stay_themselves():
    """`jax.vmap` of the operator, gradients included, is a larger batch."""
    arrays = [np.stack([array, 2 * array]) for array in problem(4, 5)]

    def both(logits, v, d_out):
        out, backward = jax.vjp(partial(outlook_attention, scale=0.3), logits, v)
        return out, *backward(d_out)

    found = jax.vmap(both)(*arrays)
    for number in range(2):
        for one, other in zip(found, both(*(array[number] for array in arrays)), strict=True):
            np.testing.assert_allclose(one[number], other, rtol=1e-5, atol=1e-6)


@pytest.mark.plan
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_both_kernels_compile(chip):
    pytest.importorskip("libtpu")
    shapes = ("bf16[2,8,8,162]", "bf16[2,16,16,64]", "bf16[2,16,16,64]")
    report = tpu_cycles.measure("benchmarks.outlook_sides:both", *shapes, chip=chip, heads=2, name="tpu")
    kernels = {use.name.split(".")[0] for use in report.kernels}
    assert kernels == {"outlook_attention_forward", "outlook_attention_backward"}
    assert not report.unknown


def test_the_benchmark_is_the_operator():
    logits, v, d_out = problem(4, 6, depth=4)
    packed = [array.reshape(*array.shape[:3], -1) for array in (logits, v, d_out)]
    found = outlook_sides.both(*packed, heads=2, name="xla")
    options = OPTIONS | {"scale": 0.5}
    expected = *oracle.forward(logits, v, **options), *oracle.backward(logits, v, d_out, **options)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one).reshape(other.shape), other, rtol=1e-4, atol=1e-5)
