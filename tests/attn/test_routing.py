"""Bi-level routing attention as functions: values and gradients by the definition, ties, transformations, meshes."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle
import simulated
from jax import ShapeDtypeStruct
from jax.ad_checkpoint import checkpoint_policies
from jaxprs import largest, steps, traced

from attn import bilevel_routing_attention, explain, fallback, routed_attention, routed_maps
from attn.routed import affinity, dense, region_means, route, top_regions, xla
from attn.routed.region_pool import POOLS, pool_regions

ROOT = Path(__file__).resolve().parents[2]
# Rows and columns of regions, sides of the map of queries, sides of that of keys.
CUTS = {
    "square": ((2, 2), (4, 4), (4, 4)),
    "not square": ((3, 2), (6, 8), (6, 8)),
    "one region": ((1, 1), (2, 3), (2, 3)),
    "places": ((2, 3), (2, 3), (2, 3)),
    "pooled keys": ((2, 2), (4, 6), (2, 4)),
}
by_xla = partial(routed_attention, implementation="xla")


def problem(cut="not square", *, batch=2, heads=2, dim=4, dim_v=3, topk=2, seed=0, dtype=np.float32):
    """q, k, v, indices, weights, a cotangent, and the options of the operator."""
    regions, queries, keys = CUTS[cut]
    rng = np.random.default_rng(seed)
    count = regions[0] * regions[1]
    indices = np.stack([[rng.permutation(count)[:topk] for _ in range(count)] for _ in range(batch)])
    q, k, v, d_out = (
        rng.normal(size=(batch, *sides, heads, width)).astype(dtype)
        for sides, width in ((queries, dim), (keys, dim), (keys, dim_v), (queries, dim_v))
    )
    weights = rng.uniform(0.1, 1, indices.shape).astype(dtype)
    return (q, k, v, indices.astype(np.int32)), weights, d_out, {"regions": regions, "scale": 0.7}


def close(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        other = np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max()))


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("cut", CUTS)
def test_output_and_gradients_are_those_of_the_definition(cut):
    inputs, _, d_out, options = problem(cut, topk=1 if cut == "one region" else 2)

    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(lambda *arrays: by_xla(*arrays, inputs[3], **options), q, k, v)
        return out, *pull(d_out)

    close(run(*inputs[:3], d_out), oracle.attend(*inputs, d_out=d_out, **options)[:4])


@pytest.mark.parametrize("cut", CUTS)
def test_dense_attention_under_a_mask_is_the_same(cut):
    """Where a region is named twice, too. The functions themselves, since only TPUs run them by choice."""
    (q, k, v, indices), _, d_out, options = problem(cut, topk=1 if cut == "one region" else 2)
    indices[0, 0] = indices[0, 0, 0]

    @jax.jit
    def run(q, k, v, d_out):
        out, lse = dense.forward(q, k, v, indices, **options)
        return (out, lse), dense.backward(q, k, v, indices, out, lse, d_out, None, **options)

    (out, lse), gradients = run(q, k, v, d_out)
    close((out, *gradients), oracle.attend(q, k, v, indices, d_out=d_out, **options)[:4])
    close(lse, xla.forward(q, k, v, indices, **options)[1])


@pytest.mark.smoke
def test_weights_multiply_keys_and_values_and_have_a_gradient():
    inputs, weights, d_out, options = problem("pooled keys")

    @jax.jit
    def run(q, k, v, weights, d_out):
        def attend(q, k, v, weights):
            return routed_attention(q, k, v, inputs[3], weights=weights, **options)

        out, pull = jax.vjp(attend, q, k, v, weights)
        return out, *pull(d_out)

    close(run(*inputs[:3], weights, d_out), oracle.attend(*inputs, weights=weights, d_out=d_out, **options))


def test_a_region_that_is_named_twice_counts_twice():
    (q, k, v, indices), _, d_out, options = problem()
    indices = np.concatenate([indices, indices[..., :1]], -1)
    out, pull = jax.vjp(lambda *arrays: by_xla(*arrays, indices, **options), q, k, v)
    close((out, *pull(d_out)), oracle.attend(q, k, v, indices, d_out=d_out, **options)[:4])


def test_values_that_are_one_hot_show_who_is_seen():
    """The keys of the routed regions and no others, exactly."""
    (q, k, _, indices), _, _, options = problem(batch=1, heads=1)
    shape, places = q.shape[1:3], oracle.region_of(q.shape[1:3], options["regions"])
    tokens = shape[0] * shape[1]
    one_hot = np.eye(tokens, dtype=np.float32).reshape(1, *shape, 1, tokens)
    seen = np.asarray(by_xla(0 * q, k, one_hot, indices, **options)).reshape(*shape, *shape)
    for region, members in enumerate(places):
        expected = np.zeros(shape, bool)
        for other in indices[0, region]:
            expected[tuple(np.transpose(places[other]))] = True
        for place in members:
            np.testing.assert_array_equal(seen[place] > 0, expected)
    assert (seen.reshape(tokens, -1) > 0).sum(1).tolist() == [2 * tokens // 6] * tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loses_what_it_must(dtype):
    inputs, _, d_out, options = problem(dtype=dtype, dim=8, dim_v=8)

    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(lambda *arrays: by_xla(*arrays, inputs[3], **options), q, k, v)
        return out, *pull(d_out)

    found = run(*inputs[:3], d_out)
    assert {str(value.dtype) for value in found} == {dtype}
    expected = oracle.attend(*inputs, d_out=d_out, **options)[:4]
    close([np.asarray(value, np.float64) for value in found], expected, 4 * float(jnp.finfo(dtype).eps))


def test_the_whole_function_routes_by_means_and_scales_by_the_width():
    (q, k, v, _), _, _, options = problem(dim_v=4)
    regions = options["regions"]
    queries, keys = (oracle.means(np.asarray(x, np.float64), regions) for x in (q, k))
    indices, _ = oracle.route(queries, keys, 3)
    found = bilevel_routing_attention(q, k, v, regions=regions, topk=3)
    close(found, oracle.attend(q, k, v, indices, regions=regions, scale=8**-0.5))
    np.testing.assert_array_equal(route(q, k, regions=regions, topk=3), indices)


def test_routing_has_no_gradient_and_the_rest_has_all():
    """The gradient is that of attention to the regions that were chosen."""
    (q, k, v, _), _, d_out, options = problem(dim_v=4)
    indices = route(q, k, regions=options["regions"], topk=2)
    d_out = np.concatenate([d_out] * 2, -1)[..., :4]
    _, pull = jax.vjp(partial(bilevel_routing_attention, topk=2, **options), q, k, v)
    close(pull(d_out), oracle.attend(q, k, v, np.asarray(indices), d_out=d_out, **options)[1:4])


# --- parts ------------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_smaller_region():
    q = jnp.zeros((1, 4, 4, 1, 2))
    np.testing.assert_array_equal(route(q, q, regions=4, topk=3)[0], np.tile(np.arange(3), (16, 1)))
    # One region is better, and the best of the rest is the first.
    k = q.at[0, 3, 1].set(1.0)
    found = route(q + 1, k, regions=4, topk=3)[0]
    np.testing.assert_array_equal(found, np.tile([13, 0, 1], (16, 1)))


def test_routing_is_in_float32_whatever_the_inputs_are():
    """Means that differ by less than a unit of bfloat16 choose."""
    q = jnp.ones((1, 2, 4, 1, 1), jnp.bfloat16)
    k = q.at[:, :, 2].set(1 + 2**-7)
    means = region_means(k, (1, 2))
    assert means.dtype == jnp.float32
    np.testing.assert_array_equal(means[0, :, 0], [1.0, 1 + 2**-8])
    np.testing.assert_array_equal(route(q, k, regions=(1, 2), topk=1)[0, :, 0], [1, 1])


def test_means_leave_padding_out():
    x = np.random.default_rng(0).normal(size=(2, 6, 8, 3))
    x[:, 5:] = x[:, :, 7:] = 0
    close(region_means(x, (3, 2), shape=(5, 7)), oracle.means(x, (3, 2), (5, 7)))
    close(region_means(x, (3, 2)), oracle.means(x, (3, 2)))


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_keys_are_pooled_inside_their_regions(kind, size):
    x = np.random.default_rng(0).normal(size=(2, 8, 10, 3, 2)).astype(np.float32)
    close(pool_regions(x, (2, 2), kind=kind, size=size), oracle.pool(x, (2, 2), kind=kind, size=size), 1e-6)


def test_pooling_to_more_places_than_there_are_repeats_them():
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 1, 2)).astype(np.float32)
    found = pool_regions(x, (1, 2), kind="adaptive_average", size=4)
    np.testing.assert_allclose(found, np.repeat(np.repeat(x, 2, 1), 2, 2), rtol=1e-6)


# --- what is not legal ------------------------------------------------------------------------------------------------


def attend_wrongly(**changes):
    (q, k, v, indices), weights, _, options = problem()
    given = {"q": q, "k": k, "v": v, "indices": indices, "weights": weights} | options
    given |= {name: change(given) if callable(change) else change for name, change in changes.items()}
    arrays = [given.pop(name) for name in ("q", "k", "v", "indices")]
    return routed_attention(*arrays, **given)


WRONG = {
    "rank": ({"q": lambda a: a["q"][0]}, r"q has 4 axes; allowed: \[batch, rows, columns, heads, width\]"),
    "regions": ({"regions": (4, 2)}, r"\(4, 2\) do not divide a map of \(6, 8\); allowed: 1, 2, 3, 6 and 1, 2, 4"),
    "regions of keys": ({"k": lambda a: a["k"][:, :4]}, r"do not divide a map of \(4, 8\)"),
    "no regions": ({"regions": 0}, r"regions=0; allowed: an integer of at least 1"),
    "values": ({"v": lambda a: a["v"][:, :3]}, "v must have the batch, map and heads of k"),
    "heads": ({"q": lambda a: a["q"][..., :1, :]}, "k must have the batch, heads and head dim of q"),
    "dtypes": ({"v": lambda a: a["v"].astype(np.float16)}, r"v float16; allowed: one for all of them, of float32, bf"),
    "indices": ({"indices": lambda a: a["indices"][:, :4]}, r"must be integers .* which is \[2, 6, ...\] here"),
    "real indices": ({"indices": lambda a: a["weights"]}, r"indices float32\[2, 6, 2\]: must be integers"),
    "weights": ({"weights": lambda a: a["weights"][..., :1]}, r"of the shape of the indices, \[2, 6, 2\]"),
    "real weights": ({"weights": lambda a: a["indices"]}, r"weights int32\[2, 6, 2\]: must be floating point"),
    "no such region": ({"indices": lambda a: a["indices"] + 1}, "there is no region 6; allowed: 0 to 5"),
    "negative": ({"indices": lambda a: a["indices"] - 1}, "there is no region -1; allowed: 0 to 5"),
    "no routes": ({"indices": lambda a: a["indices"][..., :0]}, r"indices \[2, 6, 0\]: must name at least one region"),
    "scale": ({"scale": "big"}, "scale='big'; allowed: a number"),
    "implementation": ({"implementation": "xlu"}, "unknown implementation 'xlu' of routed_attention; nearest: xla"),
    "dropout": ({"dropout": 0.5}, "attention dropout needs a key"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_legal_is_one_line_with_the_choices(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        attend_wrongly(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["int32", "int8", "uint8", "uint32"])
def test_traced_routes_outside_the_map_are_the_nearest_inside(dtype):
    """Whoever computes it, and in maps; with 300 regions, which types of a byte cannot count."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(1, 15, 20, 1, 2)), jnp.float32)
    info = np.iinfo(dtype)
    indices = np.full((1, 300, 2), 7)
    indices[0, 0], indices[0, 1] = max(-2, info.min), min(2**31 + 5, info.max)
    options = {"regions": (15, 20), "scale": 1.0}

    @jax.jit
    def run(indices):
        found = [
            routed_attention(q, q, q, indices, implementation=name, return_lse=True, **options)
            for name in ("xla", "reference")
        ]
        maps = routed_maps(q, q, found[0][1], indices, queries=np.array([[0, 0], [0, 1]]), **options)
        return found, maps

    (one, other), maps = run(jnp.asarray(indices, dtype))
    clipped = np.clip(indices, 0, 299).astype(np.int32)
    close(one, other)
    close(one[0], routed_attention(q, q, q, clipped, **options))
    seen = maps.reshape(2, -1).argmax(-1).tolist()
    assert seen == clipped[0, :2, 0].tolist()
    close(maps.sum((0, 2, 3, 4)), np.ones(2))


def test_routing_to_more_regions_than_there_are():
    for topk in (0, 7, True, 2.0):
        with pytest.raises(ValueError, match=r"there are 6 regions; allowed: 1 to 6"):
            top_regions(jnp.zeros((1, 6, 6)), topk)
    with pytest.raises(ValueError, match=r"'averag' of keys; allowed: average, max, adaptive_average"):
        pool_regions(jnp.zeros((1, 2, 2, 1, 1)), (1, 1), kind="averag", size=1)
    for size in (0, 3):
        with pytest.raises(ValueError, match=r"in regions of 2 places; allowed: 1 to 2"):
            pool_regions(jnp.zeros((1, 4, 4, 1, 1)), (2, 2), kind="max", size=size)


# --- what runs, and what it holds -------------------------------------------------------------------------------------


def test_no_array_is_larger_than_the_gathered_keys():
    """Nor in the backward pass; all regions side by side for each would be four times as large."""
    batch, regions, topk, side, heads, dim = 2, (4, 4), 4, 2, 2, 8
    q = jnp.ones((batch, 4 * side, 4 * side, heads, dim))
    gathered = batch * 16 * topk * side**2 * heads * dim
    indices, lse = jnp.zeros((batch, 16, topk), jnp.int32), jnp.ones(q.shape[:-1])
    options = {"regions": regions, "scale": 1.0}
    assert largest(partial(bilevel_routing_attention, regions=regions, topk=topk), q, q, q) < gathered
    assert largest(partial(xla.forward, **options), q, q, q, indices) == gathered
    assert largest(partial(xla.backward, **options), q, q, q, indices, q, lse, q, lse) == gathered
    # What is measured shows where it should.
    assert largest(lambda q: jnp.broadcast_to(q[:, None], (batch, 16, *q.shape[1:])) * 2, q) == 4 * gathered


@pytest.mark.parametrize(
    ("kept", "expected"), [(("attention_heads", "attention_lse"), 1), (("attention_heads",), 2), ((), 2)]
)
def test_results_that_remat_keeps_are_not_computed_again(kept, expected):
    (q, k, v, indices), _, _, options = problem(dim_v=4)

    def loss(q):
        policy = checkpoint_policies.save_only_these_names(*kept)
        layer = jax.checkpoint(lambda q, _: (by_xla(jnp.tanh(q), k, v, indices, **options), None), policy=policy)
        return jnp.sum(jax.lax.scan(layer, q, length=3)[0] ** 2)

    found = steps(jax.grad(loss), q)
    assert (found.count("forward"), found.count("backward")) == (expected, 1)


def test_explanations_and_fallbacks():
    inputs, weights, _, options = problem()
    explained = explain(routed_attention, *inputs, **options)
    assert {explained[name].implementation for name in ("cpu", "cuda")} == {"xla"}
    assert explained["tpu"].implementation == "dense"  # regions too small for the kernel, a third of them gathered
    for more in ({"weights": weights}, {"dropout": 0.1, "key": jax.random.key(0)}, {"edit": lambda site, value: value}):
        choice = explain(partial(routed_attention, **more), *inputs, **options)
        assert {choice[name].implementation for name in ("cpu", "tpu", "cuda")} == {"xla"}
        # No fallback where the gathering path would have run anyway.
        assert [choice[name].fallback_from for name in ("cpu", "tpu", "cuda")] == [None, "tpu", None]
    few = ShapeDtypeStruct((1, 9, 9, 1, 8), np.float32)
    of_81 = explain(
        partial(routed_attention, regions=9, scale=1.0), few, few, few, ShapeDtypeStruct((1, 81, 10), np.int32)
    )["tpu"]
    assert of_81.implementation == "xla"
    assert of_81.refused["dense"] == "a map of 8.1 times what is gathered; above 8 gathering is faster"
    with fallback("error"):
        jax.jit(partial(routed_attention, **options)).trace(*inputs).lower(lowering_platforms=("cpu",))


# --- edits ------------------------------------------------------------------------------------------------------------


def test_an_edit_sees_regions_and_may_change_the_routes():
    (q, k, v, indices), _, _, options = problem(dim_v=4)
    seen = {}

    def edit(site, value):
        seen[site] = value.shape
        return jnp.asarray(indices) if site == "routes" else value

    found = jax.jit(partial(bilevel_routing_attention, topk=2, edit=edit, **options))(q, k, v)
    assert seen == {"routes": (2, 6, 2), **dict.fromkeys(("logits", "probs"), (2, 6, 2, 8, 2 * 8))}
    close(found, oracle.attend(q, k, v, indices, **options))

    def uniform(site, value):
        return jnp.full_like(value, 1 / value.shape[-1]) if site == "probs" else value

    found = jax.jit(partial(routed_attention, edit=uniform, **options))(q, k, v, indices)
    close(found, oracle.attend(0 * q, k, v, indices, **options))


def test_an_edit_of_routes_alone_leaves_the_choice_as_it_is():
    (q, k, v, indices), _, _, options = problem(dim_v=4)

    def edit(site, value):
        assert site == "routes"
        return jnp.asarray(indices)

    edit.sites = ("routes",)
    run = partial(bilevel_routing_attention, topk=2, edit=edit, **options)
    assert steps(run, q, k, v) == ["forward"]
    close(jax.jit(run)(q, k, v), oracle.attend(q, k, v, indices, **options))


def test_dropout_is_of_probabilities():
    (q, k, v, indices), _, _, options = problem()
    run = jax.jit(partial(routed_attention, dropout=0.25, **options))
    found = np.asarray(run(q, k, 0 * v + 1, indices, key=jax.random.key(0)))
    assert abs(found.mean() - 1) < 0.05
    assert found.std() > 0.01
    np.testing.assert_array_equal(found, run(q, k, 0 * v + 1, indices, key=jax.random.key(0)))


# --- transformations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["values", "gradients"])
@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (0, None, None, None), (None, 0, None, 0), (None, None, None, 0)])
def test_vmap_is_a_loop(mapped, what):
    several = [problem(seed=seed)[0] for seed in range(3)]
    options = problem()[3]
    arrays = [np.stack([one[i] for one in several]) if axis == 0 else several[0][i] for i, axis in enumerate(mapped)]

    def function(q, k, v, indices):
        run = partial(by_xla, **options)
        if what == "values":
            return run(q, k, v, indices)
        return jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x, indices))), argnums=(0, 1, 2))(q, k, v)

    one = jax.jit(function)
    each = [one(*(a[i] if axis == 0 else a for a, axis in zip(arrays, mapped, strict=True))) for i in range(3)]
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    close(jax.jit(jax.vmap(function, in_axes=mapped))(*arrays), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_devices_exchange_nothing():
    """On 2 x 2 x 2 devices: results of one, and no collective at all."""
    found = simulated.run(8, ROOT / "tests" / "routing_mesh_job.py")
    for case, result in found.items():
        assert result["difference"] < 1e-5, case
        # A collective of the output is seen where there has to be one.
        assert bool(result["exchanged"]) == (case == "whole results"), (case, result["exchanged"])
    assert found["plain"]["share"] == "float32[2,4,6,2,8]"
    assert found["heads that are not divided"]["share"] == "float32[2,4,6,3,8]"
    assert found["a batch that is not divided"]["share"] == "float32[6,4,6,2,8]"
    assert found["mapped"]["share"] == "float32[6,4,6,2,8]"


def test_affinities_are_exact_products():
    """Where matrix products are rounded by default (TPUs), these are asked for in full precision."""
    found = traced(affinity, jnp.ones((1, 2, 3)), jnp.ones((1, 2, 3)))
    products = [eqn for eqn in found if eqn.primitive.name == "dot_general"]
    assert [eqn.params["precision"] for eqn in products] == [(jax.lax.Precision.HIGHEST,) * 2]
