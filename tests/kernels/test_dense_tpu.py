"""The TPU kernels of dense attention of short sequences: interpreted on the CPU, and compiled by the TPU's compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreting import interpreted

import attn
from attn.dense import packed, xla
from attn.dense.api import DENSE, Settings, dense_attention
from benchmarks import tpu_cycles
from kernels.dense import oracle, tpu, tpu_packed

NAMES = ("out", "d_q", "d_k", "d_v")


def problem(queries, keys=None, heads=2, depth=64, batch=2):
    """q, k, v and a cotangent, rounded to bfloat16."""
    random = np.random.default_rng(0)
    sides = (queries, keys or queries, keys or queries, queries)
    return [jnp.asarray(random.standard_normal((batch, side, heads, depth)), jnp.bfloat16) for side in sides]


def results(implementation, arrays, *, compiled=True, scale=0.125, **options):
    def run(q, k, v, d_out):
        shared = {"scale": scale, **options}
        return *implementation.forward(q, k, v, **shared), *implementation.backward(q, k, v, d_out, **shared)

    found = (jax.jit(run) if compiled else run)(*arrays)
    return {name: np.asarray(value, np.float64) for name, value in zip(NAMES, found, strict=True)}


def errors(found, arrays, **options):
    """Largest difference from the oracle, relative to the largest number there."""
    exact = results(oracle, [np.asarray(array, np.float64) for array in arrays], compiled=False, **options)
    return {name: np.abs(value - exact[name]).max() / np.abs(exact[name]).max() for name, value in found.items()}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((19,), {"heads": 4, "depth": 32}),  # four heads in 128 lanes
        ((17, 23), {}),  # queries of other tokens than keys
        ((13,), {"heads": 3, "depth": 48}),  # heads across vectors of lanes, the last one not full
        ((9,), {"heads": 4, "depth": 96}),
        ((8, 9), {"heads": 1, "depth": 128}),
        ((516, 24), {"batch": 1}),  # queries in blocks, and some left over
        ((10,), {"scale": -0.3}),  # the largest logit is that of the smallest product
    ],
)
def test_results_and_gradients_lose_no_more_than_the_plain_path_does(sizes, options):
    options = dict(options)
    scale = options.pop("scale", 0.125)
    arrays = problem(*sizes, **options)
    assert tpu.refuse(*arrays[:3], with_lse=False) is None
    with interpreted():
        found = results(tpu, arrays, with_lse=False, scale=scale)
    lost = errors(found, arrays, scale=scale)
    plain = errors(results(xla, arrays, with_lse=False, scale=scale), arrays, scale=scale)
    for name, error in lost.items():
        # A loss may be small by luck: it counts as one unit in the last place at least.
        assert error <= 1.5 * max(plain[name], float(jnp.finfo(jnp.bfloat16).eps) / 2), (name, error, plain)


@pytest.mark.parametrize(("tokens", "heads", "depth"), [(19, 4, 32), (516, 2, 64), (9, 4, 96), (8, 9, 128)])
def test_a_packed_projection_is_read_and_its_gradient_written_where_it_lies(tokens, heads, depth):
    q, k, v, d_out = problem(tokens, heads=heads, depth=depth, batch=2 if tokens < 100 else 1)
    qkv, d_out = jnp.stack([q, k, v], axis=2).reshape(*q.shape[:2], -1), d_out.reshape(*q.shape[:2], -1)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal(qkv.shape[-1]), jnp.float32)

    def run(module, qkv, bias, d_out):
        options = {"heads": heads, "scale": 0.1}
        return jax.jit(lambda *x: (*module.forward(*x[:2], **options), *module.backward(*x, **options)))(
            qkv, bias, d_out
        )

    assert tpu_packed.refuse(qkv, bias, heads=heads) is None
    with interpreted():
        found = run(tpu_packed, qkv, bias, d_out)
    plain = packed.Apart(xla)
    exact = run(plain, *(array.astype(jnp.float32) for array in (qkv, bias, d_out)))
    for one, other, true in zip(found, run(plain, qkv, bias, d_out), exact, strict=True):
        lost, allowed = (jnp.abs(x.astype(jnp.float32) - true).max() / jnp.abs(true).max() for x in (one, other))
        assert lost <= 1.5 * max(allowed, float(jnp.finfo(jnp.bfloat16).eps) / 2)


def test_large_logits_do_not_overflow_and_examples_and_heads_are_apart():
    """NaN in one head of one example stays there; logits of a thousand have a softmax."""
    q, k, v, d_out = problem(11, heads=4, depth=32)
    q = q * 300
    with interpreted():
        clean = results(tpu, [q, k, v, d_out], with_lse=False)
        found = results(tpu, [q, k, v.at[0, :, 1].set(jnp.nan), d_out], with_lse=False)
    for name in NAMES:
        assert np.isfinite(clean[name]).all(), name
        np.testing.assert_array_equal(found[name][1], clean[name][1], err_msg=name)
    np.testing.assert_array_equal(found["out"][0, :, [0, 2, 3]], clean["out"][0, :, [0, 2, 3]])


def choice(queries=197, keys=None, heads=12, depth=64, key_heads=None, dtype=jnp.bfloat16, *, with_lse=False, asked=()):
    q = jax.ShapeDtypeStruct((2, queries, heads, depth), dtype)
    k = jax.ShapeDtypeStruct((2, keys or queries, key_heads or heads, depth), dtype)
    return DENSE.choose("tpu", (q, k, k), Settings(0.125, with_lse), asked)


@pytest.mark.smoke
def test_what_the_kernel_does_not_have_is_refused():
    for made in (choice(), choice(577, heads=16, depth=80), choice(8, 256), choice(1024)):
        assert made.implementation == "tpu"
    for reason, made in {
        "is for bfloat16": choice(dtype=jnp.float32),
        "no look at the maps": choice(asked=("look at the maps",)),
        "has no bias": choice(asked=("bias",)),
        "the logsumexp": choice(with_lse=True),
        "as many key heads": choice(key_heads=3),
        "head dim 40": choice(depth=40),
        "1200 queries": choice(1200),
        "1 queries and 256 keys": choice(1, 256),
    }.items():
        assert (made.implementation, made.fallback_from) == ("xla", "tpu")
        assert reason in made.refused["tpu"], made.refused


def test_a_packed_projection_that_is_not_read_where_it_lies_is_taken_apart():
    def choice(tokens, heads, depth):
        qkv = jax.ShapeDtypeStruct((2, tokens, 3 * heads * depth), jnp.bfloat16)
        return packed.PACKED.choose("tpu", (qkv, None), packed.Settings(heads, 0.1))

    assert choice(197, 12, 64).implementation == "tpu_packed"
    assert choice(2048, 12, 64).implementation == "splash"
    for reason, made in {"192 channels": choice(197, 3, 64), "an example in one array": choice(577, 16, 64)}.items():
        assert (made.implementation, made.fallback_from) == ("tpu", "tpu_packed")
        assert reason in made.refused["tpu_packed"]


@pytest.mark.parametrize(
    ("sizes", "group", "block"),
    [((197, 197, 12, 64), 12, 197), ((577, 577, 16, 64), 2, 256), ((196, 196, 3, 48), 3, 196), ((8, 8, 9, 64), 9, 8)],
)
def test_a_step_has_whole_vectors_of_lanes_and_so_many_logits(sizes, group, block):
    plan = tpu.planned(*sizes)
    assert (plan.group, plan.block) == (group, block)
    assert plan.group == sizes[2] or plan.group * plan.depth % 128 == 0


def test_the_operator_runs_the_kernel_forward_and_backward():
    q, k, v, d_out = problem(9)

    def loss(q, k, v):
        return (dense_attention(q, k, v, implementation="tpu") * d_out).sum()

    calls = attn.explain(jax.grad(loss, argnums=(0, 1, 2)), q, k, v).calls
    assert {call.choices["tpu"].implementation for call in calls} == {"tpu"}


@pytest.mark.plan
@pytest.mark.parametrize(("chip", "tokens", "heads", "depth"), [("v5e", 50, 4, 64), ("v6e", 600, 4, 80)])
def test_both_kernels_compile(chip, tokens, heads, depth):
    pytest.importorskip("libtpu")
    arrays = [f"bf16[2,{tokens},{heads * depth}]"] * 4
    report = tpu_cycles.measure("benchmarks.dense_tpu:packed", *arrays, chip=chip, heads=heads, implementation="tpu")
    kernels = {use.name.split(".")[0] for use in report.kernels}
    assert kernels == {"short_attention_forward", "short_attention_backward"}
    assert not report.unknown
