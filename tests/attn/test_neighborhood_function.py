"""The public function: checks, gradients, transformations, meshes, and maps of chosen queries. Values and sets of the
implementations have modules of their own."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
from jax.ad_checkpoint import checkpoint_policies
from jaxprs import largest, steps, traced
from lowering import device, lowered

from attn import explain, fallback, merge_attention, neighborhood_attention, neighborhood_maps
from attn.core.operator import Implementation
from attn.core.shards import MESH_AXES
from attn.neighborhood import api, tiles
from attn.neighborhood import reference as implementation
from kernels.neighborhood.pattern import make_pattern
from models.core import sharding

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("q", "k", "v", "bias", "extra_keys", "extra_values")
OPTIONS = dict(window=(3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(False, True), scale=0.3)


def problem(shape=(6, 5), *, batch=2, heads=4, kv_heads=2, dim=8, dim_v=6, window=(3, 4), extra=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "q": (batch, *shape, heads, dim),
        "k": (batch, *shape, kv_heads, dim),
        "v": (batch, *shape, kv_heads, dim_v),
        "bias": (heads, *(2 * size - 1 for size in window)),
        "extra_keys": (batch, extra, kv_heads, dim),
        "extra_values": (batch, extra, kv_heads, dim_v),
    }
    return {name: jnp.asarray(rng.normal(size=shapes[name]), jnp.float32) for name in NAMES}


def attend(arrays, **options):
    rest = {name: arrays[name] for name in NAMES[3:] if name in arrays}
    return neighborhood_attention(arrays["q"], arrays["k"], arrays["v"], **rest, **{**OPTIONS, **options})


def close(found, expected, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1, float(jnp.abs(other).max())))


def reference(arrays, *, scale=0.3):
    pattern = make_pattern((6, 5), (3, 4), stride=(1, 2), dilation=(2, 1), is_causal=(False, True))
    return implementation.forward(*(arrays.get(name) for name in NAMES), pattern=pattern, scale=scale)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_results_and_gradients_are_those_of_the_reference():
    arrays = problem()
    weights = jax.random.normal(jax.random.key(1), (2, 6, 5, 4))

    def total(run):
        def loss(arrays):
            out, lse = run(arrays)
            return jnp.sum(jnp.sin(out)) + jnp.sum(weights * lse)

        return jax.jit(lambda arrays: (run(arrays), jax.grad(loss)(arrays)))(arrays)

    close(total(lambda arrays: attend(arrays, return_lse=True)), total(reference))


def test_arguments_that_are_absent_have_no_gradient():
    arrays = {name: value for name, value in problem().items() if name in ("q", "k", "v")}

    def both(run):
        return jax.jit(lambda arrays: (run(arrays), jax.grad(lambda arrays: run(arrays).sum())(arrays)))(arrays)

    close(both(attend), both(lambda arrays: reference(arrays)[0]))


def test_no_extra_keys_are_none_at_all():
    arrays = problem(extra=0)
    without = {name: arrays[name] for name in NAMES[:4]}
    run = jax.jit(functools.partial(attend, implementation="reference"))
    np.testing.assert_array_equal(run(arrays), run(without))


def test_a_program_for_any_batch_computes_what_one_for_a_batch_does():
    arrays = problem(batch=3)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = {
        name: jax.ShapeDtypeStruct(value.shape if name == "bias" else (batch, *value.shape[1:]), value.dtype)
        for name, value in arrays.items()
    }
    exported = jax.export.export(jax.jit(attend), platforms=["cpu"])(shapes)
    found = jax.tree.leaves(exported.call(arrays))
    for ours, expected in zip(found, jax.tree.leaves(attend(arrays)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_a_scale_of_zero_is_zero():
    arrays = {name: value for name, value in problem().items() if name in ("q", "k", "v")}
    options = dict(is_causal=False, return_lse=True, implementation="reference")
    np.testing.assert_allclose(attend(arrays, scale=0.0, **options)[1], np.log(12), rtol=1e-6)
    default, explicit = (attend(arrays, scale=scale, **options)[1] for scale in (None, 8**-0.5))
    np.testing.assert_array_equal(default, explicit)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_come_back(dtype):
    arrays = {name: value.astype(dtype) for name, value in problem().items()}

    def step(arrays):
        results, pull = jax.vjp(lambda arrays: attend(arrays, return_lse=True), arrays)
        return results, pull(results)[0]

    (out, lse), gradients = jax.eval_shape(step, arrays)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    assert {value.dtype for value in gradients.values()} == {jnp.dtype(dtype)}


def test_parts_merge_to_the_whole_with_its_gradients():
    """Keys outside and inside the map, attended apart and merged: the logsumexp has a gradient."""
    arrays = problem()
    apart = {name: value for name, value in arrays.items() if name in NAMES[:4]}

    def in_parts(arrays):
        near = attend({name: arrays[name] for name in apart}, return_lse=True)
        keys, values = arrays["extra_keys"], arrays["extra_values"]
        logits = 0.3 * jnp.einsum("b...hgd,bmhd->b...hgm", arrays["q"].reshape(2, 6, 5, 2, 2, 8), keys)
        far = jnp.einsum("b...hgm,bmhe->b...hge", jax.nn.softmax(logits), values)
        lse = jax.nn.logsumexp(logits, -1)
        parts = [near, (far.reshape(2, 6, 5, 4, 6), lse.reshape(2, 6, 5, 4))]
        return merge_attention(*zip(*parts, strict=True))

    def both(run):
        gradient = jax.grad(lambda arrays: sum(jnp.sum(jnp.cos(part)) for part in run(arrays)))
        return jax.jit(lambda arrays: (run(arrays), gradient(arrays)))(arrays)

    close(both(in_parts), both(reference), 1e-4)


def test_a_clamped_window_uses_the_centre_of_the_bias():
    arrays = problem(shape=(3, 5), window=(5, 3), extra=0)
    options = dict(window=(5, 3), stride=1, dilation=1, is_causal=False)
    with pytest.raises(ValueError, match="on_oversize='clamp'"):
        attend(arrays, **options)
    with pytest.warns(UserWarning, match="using window 3"):
        found = jax.jit(functools.partial(attend, **options, on_oversize="clamp"))(arrays)
    cropped = {**arrays, "bias": arrays["bias"][:, 2:-2]}
    np.testing.assert_array_equal(found, jax.jit(functools.partial(attend, **{**options, "window": 3}))(cropped))


# --- what is not legal ------------------------------------------------------------------------------------------------

WRONG = {
    "rank": (lambda a: {"q": a["q"][0, 0]}, {}, r"q has 3 axes; allowed: \[batch, 1 to 3 axes of a map, heads"),
    "map": (lambda a: {"q": a["q"][0]}, {}, r"k must have the batch and the map of q, \(6, 5\)"),
    "map of k": (lambda a: {"k": a["k"][:, :5]}, {}, r"k must have the batch and the map of q, \(2, 6, 5\)"),
    "heads": (lambda a: {"q": a["q"][..., :3, :]}, {}, r"divides the 3 heads of q; allowed: 1, 3"),
    "heads of v": (lambda a: {"v": a["v"][..., :1, :]}, {}, r"allowed: 1, 2, 4"),
    "head dim": (lambda a: {"k": a["k"][..., :4]}, {}, r"k must have the head dim of q, 8"),
    "dtype": (lambda a: {"k": a["k"].astype(jnp.bfloat16)}, {}, r"k bfloat16.*allowed: one for all of them, of"),
    "integers": (lambda a: {name: a[name].astype(int) for name in a}, {}, r"of float32, bfloat16, float16"),
    "one extra": (lambda a: {"extra_values": None}, {}, r"allowed: both, or neither"),
    "extra batch": (lambda a: {"extra_keys": a["extra_keys"][:1]}, {}, r"extra_keys must be \[2, M, 2, 8\]"),
    "extra number": (lambda a: {"extra_keys": a["extra_keys"][:, :1]}, {}, r"one M for extra keys and extra values"),
    "extra dim": (lambda a: {"extra_values": a["extra_values"][..., 1:]}, {}, r"extra_values must be \[2, M, 2, 6\]"),
    "bias": (lambda a: {"bias": a["bias"][:, 1:]}, {}, r"which is \[4, 5, 7\] here"),
    "bias heads": (lambda a: {"bias": a["bias"][:2]}, {}, r"which is \[4, 5, 7\] here"),
    "window": (lambda a: {}, {"window": (3, 0)}, r"window=\(3, 0\); allowed: an integer of at least 1"),
    "window entries": (lambda a: {}, {"window": (3, 3, 3)}, r"3 entries for 2 axes"),
    "stride": (lambda a: {}, {"stride": 4}, r"stride 4 is larger than window 3.*allowed: 1 to 3"),
    "dilation": (lambda a: {}, {"dilation": 3}, r"longer than axis 0.*allowed: window up to 2 with dilation 3"),
    "causal": (lambda a: {}, {"is_causal": 1}, r"is_causal=1; allowed: True or False"),
    "oversize": (lambda a: {}, {"on_oversize": "pad"}, r"allowed: 'error', 'clamp'"),
    "scale": (lambda a: {}, {"scale": "big"}, r"scale='big'; allowed: a number"),
    "implementation": (lambda a: {}, {"implementation": "referense"}, "nearest: reference; allowed: dense, tpu,"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_legal_is_one_line_with_the_choices(case):
    change, options, message = WRONG[case]
    arrays = problem()
    with pytest.raises(ValueError, match=message) as error:
        attend({**arrays, **change(arrays)}, **options)
    assert "\n" not in str(error.value)


# --- what runs --------------------------------------------------------------------------------------------------------

KERNELS = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_explained_is_what_is_lowered(dtype):
    """Forward and backward together, with the kernels of each platform."""
    arrays = {name: value.astype(dtype) for name, value in problem(batch=1, dim_v=8).items()}
    gradient = jax.grad(lambda arrays: attend(arrays).astype(jnp.float32).sum())
    explained = explain(attend, arrays)
    assert explained == explain(gradient, arrays)
    names = {platform: explained[platform].implementation for platform in ("cpu", "tpu", "cuda")}
    assert names == {"cpu": "xla", "tpu": "xla" if dtype == "float16" else "tpu", "cuda": "gpu"}
    for platform, name in names.items():
        text = lowered(gradient, platform, arrays)
        assert [found for found in KERNELS if KERNELS[found] in text] == [name] * (name in KERNELS)


def test_several_examples_of_a_small_map_are_dense_on_a_tpu():
    arrays = problem(batch=3, dim_v=8)
    assert explain(attend, arrays)["tpu"].implementation == "dense"
    assert not any(name in lowered(attend, "tpu", arrays) for name in KERNELS.values())
    large = {name: jax.ShapeDtypeStruct((300, *arrays[name].shape[1:]), "bfloat16") for name in ("q", "k", "v")}
    assert explain(attend, large)["tpu"].implementation == "dense"  # 300 x 4 x 30 x 30 logits
    large = {name: jax.ShapeDtypeStruct((4000, *one.shape[1:]), one.dtype) for name, one in large.items()}
    assert explain(attend, large)["tpu"].implementation == "tpu"


def test_a_fallback_is_an_error_where_it_is_one():
    arrays = {name: value.astype("float16") for name, value in problem(batch=1, dim_v=8).items()}
    with fallback("error"), device("cuda"):
        traced = jax.jit(jax.grad(lambda arrays: attend(arrays).astype(jnp.float32).sum())).trace(arrays)
        for platform in ("cpu", "cuda"):
            traced.lower(lowering_platforms=(platform,))
        with pytest.raises(ValueError, match=r"attention on tpu: 'tpu' refuses .*float16.*window \(3, 4\)"):
            traced.lower(lowering_platforms=("tpu",))


# --- transformations --------------------------------------------------------------------------------------------------


MAPPED = {
    "all": (NAMES, NAMES),
    "arrays": (NAMES, ("q", "k", "v")),
    "queries": (NAMES, ("q",)),
    "bias": (NAMES, ("bias",)),
    "all, no bias": (NAMES[:3] + NAMES[4:], NAMES[:3] + NAMES[4:]),
    "keys, no bias": (NAMES[:3], ("k",)),
}


@pytest.fixture
def gathered(monkeypatch):
    """The reference as an implementation like others: differentiated and mapped by the operator, quick to compile."""
    first = Implementation("gathered", "attn.neighborhood.reference")
    operator = dataclasses.replace(api.NEIGHBORHOOD, implementations=(first, api.NEIGHBORHOOD.implementations[-1]))
    monkeypatch.setattr(api, "NEIGHBORHOOD", operator)


@pytest.mark.parametrize("what", ["values", "gradients"])
@pytest.mark.parametrize("case", MAPPED)
def test_vmap_is_a_loop(case, what, gathered):
    present, mapped = MAPPED[case]
    several = [problem(seed=seed) for seed in range(3)]
    arrays = {n: jnp.stack([one[n] for one in several]) if n in mapped else several[0][n] for n in present}

    def function(arrays):
        run = functools.partial(attend, return_lse=True)
        return run(arrays) if what == "values" else jax.grad(lambda a: sum(jnp.sum(x**2) for x in run(a)))(arrays)

    axes = ({name: 0 if name in mapped else None for name in arrays},)
    one = jax.jit(function)
    each = [one({n: v[i] if n in mapped else v for n, v in arrays.items()}) for i in range(3)]
    expected = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    close(jax.jit(jax.vmap(function, in_axes=axes))(arrays), expected, 1e-4)


@pytest.mark.smoke
def test_gradients_of_a_vmap_of_a_vmap_add_up():
    arrays = problem(batch=6)
    nested = {n: value if n == "bias" else value.reshape(3, 2, 1, *value.shape[1:]) for n, value in arrays.items()}
    axes = {name: None if name == "bias" else 0 for name in arrays}

    def plain(arrays):
        return sum(jnp.sum(jnp.sin(part)) for part in attend(arrays, return_lse=True))

    def twice(arrays):
        run = jax.vmap(jax.vmap(lambda arrays: attend(arrays, return_lse=True), in_axes=(axes,)), in_axes=(axes,))
        return sum(jnp.sum(jnp.sin(part)) for part in run(arrays))

    found, expected = jax.jit(jax.grad(twice))(nested), jax.jit(jax.grad(plain))(arrays)
    close({name: found[name].reshape(value.shape) for name, value in expected.items()}, expected, 1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kept", "expected"), [(("attention_heads", "attention_lse"), 1), (("attention_heads",), 2), ((), 2)]
)
def test_results_that_remat_keeps_are_not_computed_again(kept, expected):
    arrays = problem()

    def loss(arrays):
        def layer(x, _):
            heads = attend({**arrays, "q": jnp.tanh(x)})
            return jnp.concatenate([jnp.sin(heads), heads[..., :2]], -1), None

        policy = checkpoint_policies.save_only_these_names(*kept)
        body = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(body, arrays["q"], length=3)[0] ** 2)

    found = steps(jax.grad(loss), arrays)
    assert (found.count("forward"), found.count("backward")) == (expected, 1)


# --- maps of chosen queries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_probabilities_are_those_that_the_run_used(rank):
    """With one-hot values the output is the map."""
    shape, window = ((12,), (6, 5), (3, 4, 5))[rank - 1], ((4,), (3, 4), (2, 3, 3))[rank - 1]
    options = dict(window=window, stride=1, dilation=2 if rank == 1 else 1, is_causal=(False, False, True)[-rank:])
    tokens = int(np.prod(shape))
    arrays = problem(shape, batch=1, window=window, extra=3)
    hot = jnp.broadcast_to(jnp.eye(tokens + 3)[:, None], (tokens + 3, 2, tokens + 3))
    values = hot[:tokens].reshape(1, *shape, 2, -1)
    read = {**arrays, "v": values, "extra_values": hot[None, tokens:]}
    out, lse = jax.jit(functools.partial(attend, return_lse=True, implementation="reference", **options))(read)
    queries = np.stack(np.unravel_index([0, 7, tokens - 1], shape), 1)
    rest = dict(bias=arrays["bias"], extra_keys=arrays["extra_keys"], scale=0.3, **options)
    q, k = arrays["q"], arrays["k"]
    maps, extra = jax.jit(lambda queries: neighborhood_maps(q, k, lse, queries=queries, **rest))(queries)
    assert maps.shape == (1, 3, 4, *shape)
    expected = out.reshape(tokens, 4, -1)[jnp.asarray([0, 7, tokens - 1])]
    close(maps.reshape(3, 4, tokens), expected[..., :tokens])
    close(extra[0], expected[..., tokens:])
    assert not maps.reshape(3, 4, tokens)[expected[..., :tokens] == 0].any()
    rest.pop("extra_keys")
    run = functools.partial(neighborhood_maps, **rest)
    assert jax.eval_shape(run, q, k, lse, queries=queries).shape == maps.shape


def test_probabilities_of_queries_that_are_nowhere():
    arrays = problem()
    q, k, lse = arrays["q"], arrays["k"], jnp.zeros((2, 6, 5, 4))
    for queries, message in (
        (np.array([[0, 5]]), r"query \[0, 5\] is not on the map \(6, 5\)"),
        (np.array([[0, -1]]), "not on the map"),
        (np.array([0, 1]), r"must be integers \[queries, 2\]"),
        (np.array([[0.0, 1.0]]), "must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            neighborhood_maps(q, k, lse, queries=queries, window=3)
    with pytest.raises(ValueError, match="lse"):
        neighborhood_maps(q, k, lse[..., 0], queries=np.array([[0, 0]]), window=3)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_dropout():
    """Arrays, what dropout leaves of each probability (extra keys first), and output, logsumexp and gradients with it.

    With one-hot values the output is the map, and values are not looked at when it is drawn what to drop.
    """
    arrays = problem(dim_v=6)
    options = dict(window=(3, 4), stride=1, dilation=1, is_causal=False, return_lse=True)
    hot = jnp.broadcast_to(jnp.eye(32)[:, None], (2, 32, 2, 32))
    read = {**arrays, "v": hot[:, :30].reshape(2, 6, 5, 2, 32), "extra_values": hot[:, 30:]}

    def run(arrays, rate, key):
        return attend(arrays, dropout=rate, key=key, **options)

    maps = [jax.jit(functools.partial(run, rate=rate))(read, key=jax.random.key(1))[0] for rate in (0.0, 0.3)]
    whole, dropped = (np.moveaxis(one.reshape(2, 30, 4, 32), 1, 2) for one in maps)
    kept = np.divide(dropped, whole, out=np.zeros_like(whole), where=whole > 0)
    kept, whole = (np.concatenate([one[..., 30:], one[..., :30]], -1) for one in (kept, whole))
    weights = jax.random.normal(jax.random.key(2), (2, 6, 5, 4, 6))

    @jax.jit
    def both(arrays):
        def loss(arrays):
            results = run(arrays, 0.3, jax.random.key(1))
            return (results[0] * weights).sum() + jnp.sin(results[1]).sum(), results

        gradients, results = jax.grad(loss, has_aux=True)(arrays)
        return results, gradients

    @jax.jit
    def by_hand(arrays):
        def edit(site, value):
            return value * kept if site == "probs" else value

        def loss(arrays):
            results = attend(arrays, edit=edit, **options)
            return (results[0] * weights).sum() + jnp.sin(results[1]).sum(), results

        gradients, results = jax.grad(loss, has_aux=True)(arrays)
        return results, gradients

    return arrays, options, (kept, whole > 0), both(arrays), by_hand(arrays)


def test_dropout_scales_what_it_keeps_and_has_the_gradients_of_that(with_dropout):
    _, _, (kept, seen), found, expected = with_dropout
    kept = kept[seen]
    np.testing.assert_allclose(kept[kept > 0], 1 / 0.7, rtol=1e-5)
    assert abs((kept > 0).mean() - 0.7) < 0.03
    close(found, expected)


def test_examples_heads_and_tiles_drop_different_things(with_dropout):
    """Read from the two extra keys, which stand at the same place of all tiles; the map has two of three rows."""
    extra = with_dropout[2][0][..., :2].reshape(2, 2, 2, 2, 15, 2) > 0  # examples, key heads, group, tiles, queries
    for axis in range(4):
        same = (np.take(extra, 0, axis) == np.take(extra, 1, axis)).mean()
        assert abs(same - (0.7**2 + 0.3**2)) < 0.1, axis


def test_what_is_dropped_does_not_depend_on_blocks(with_dropout, monkeypatch):
    """Nor on the examples of a chunk, so neither on the devices of a mesh."""
    arrays, options, _, (results, _), _ = with_dropout
    monkeypatch.setattr(tiles, "BLOCK", 50)
    run = functools.partial(attend, dropout=0.3, key=jax.random.key(1), **options)
    close(jax.jit(lambda arrays: run(arrays))(arrays), results)
    one = {name: value if name == "bias" else value[:1] for name, value in arrays.items()}
    close(jax.jit(lambda arrays: run(arrays))(one), [part[:1] for part in results])


def test_results_with_dropout_are_kept_by_name_too():
    """Counted are products: two of a forward pass, of which an lse needs one, and five of a backward pass."""
    arrays = problem()

    def products(*kept):
        policy = checkpoint_policies.save_only_these_names(*kept)
        layer = jax.checkpoint(functools.partial(attend, dropout=0.1, key=jax.random.key(0)), policy=policy)
        found = traced(jax.grad(lambda arrays: layer(arrays).sum()), arrays)
        return sum(equation.primitive.name == "dot_general" for equation in found)

    assert [products("attention_heads", "attention_lse"), products("attention_heads"), products()] == [7, 8, 9]


def test_dropout_makes_no_map_of_all_pairs():
    """On a map of 56 x 56, where all pairs would be 64 times what is seen; and `explain` says what runs."""
    arrays = [jax.ShapeDtypeStruct((2, 56, 56, 4, 32), jnp.float32)] * 3

    def run(q, k, v, **options):
        return neighborhood_attention(q, k, v, window=7, dropout=0.1, key=jax.random.key(0), **options).sum()

    assert largest(jax.grad(run, (0, 1, 2)), *arrays) <= 1.05 * 2 * 56 * 56 * 4 * 32
    explained = explain(run, *arrays)
    assert {explained[platform].implementation for platform in ("cpu", "tpu", "cuda")} == {"xla"}
    assert explained["tpu"].refused["tpu"] == explained["cuda"].refused["gpu"] == "has no dropout"
    assert explained["cpu"].fallback_from is None
    assert explain(functools.partial(run, edit=lambda site, value: value), *arrays)["cpu"].refused["xla"] == (
        "has no look at the maps"
    )
    with pytest.raises(ValueError, match="implementation='gpu' of neighborhood_attention: has no dropout"):
        jax.eval_shape(functools.partial(run, implementation="gpu"), *arrays)


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
def test_devices_exchange_sums_of_tables_and_nothing_else():
    """On 2 x 2 x 2 devices: results of one, and no collective of queries, keys, values, outputs or their gradients."""
    found = simulated.run(8, ROOT / "tests" / "attention_mesh_job.py")
    undivided = "heads that are not divided"
    heads = {undivided: [6], f"dropped, {undivided}": [6], "mapped": [3, 2]}
    for case, result in found.items():
        assert result["difference"] < 1e-5, case
        if case == "a batch that is not divided":
            assert result["exchanged"] == [], case
        elif case == "whole results":
            # A collective of the output is seen where there has to be one.
            assert ["all-gather", [8, 6, 5, 4, 8]] in result["exchanged"]
        else:
            assert result["exchanged"] == [["all-reduce", [*heads.get(case, [2]), 5, 7]]], case
    assert found["plain"]["share"] == "float32[2,6,5,2,8]"
    assert found["heads that are not divided"]["share"] == "float32[2,6,5,6,8]"
    assert found["a batch that is not divided"]["share"] == "float32[6,6,5,2,8]"
    assert found["mapped"]["share"] == "float32[6,6,5,2,8]"


def test_mesh_axes_are_those_of_the_models():
    assert MESH_AXES == {"batch": sharding.BATCH, "heads": (sharding.TENSOR,)}
