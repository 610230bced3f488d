"""What every operator does alike: one line for what is wrong, derivatives, programs for any platform, maps, meshes."""

import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import operators
import pytest
import simulated
from operators import BATCH, CASES

import attn
from attn import explain, fallback

ROOT = Path(__file__).resolve().parents[2]
each_operator = pytest.mark.parametrize("name", CASES)


def close(found, expected, tolerance=1e-5):
    """Relative to the largest number, or to 1."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        other = np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * max(1.0, np.abs(other).max(initial=0)))


def loss(name, **options):
    """A number from the results of an operator, and one that sees all of them."""

    def total(*arrays):
        found = CASES[name].bound(arrays[0].shape[0], **options)(*arrays)
        return sum(jnp.sum(jnp.sin(3 * x.astype(jnp.float32))) for x in jax.tree.leaves(found))

    return total


@cache
def gradient(name):
    """With respect to all arrays, and the number itself, compiled."""
    return jax.jit(jax.value_and_grad(loss(name, return_lse=True), tuple(range(len(CASES[name].shapes)))))


# --- maps of chosen queries -------------------------------------------------------------------------------------------


@each_operator
def test_maps_of_a_run_that_keeps_none_are_what_an_edit_sees(name):
    case = CASES[name]

    @jax.jit
    def run(*arrays):
        seen = {}

        def look(site, value):
            seen[site] = value
            return value

        fused = case.bound(return_lse=True)(*arrays)
        looked = case.bound(return_lse=True, edit=look)(*arrays)
        maps = case.maps(fused[1], *arrays)
        return fused, looked, maps, case.chosen(seen["probs"])

    fused, looked, maps, probs = run(*case.arrays())
    close(fused, looked)
    assert maps.dtype == probs.dtype == jnp.float32
    assert maps.shape == probs.shape
    close(maps, probs, 2e-6)
    assert float(probs.max()) > 0.2


def no_maps():
    """Calls of maps functions, and what is said."""
    dense, channel, outlook, window, halo, bottleneck = (
        CASES[name].arrays() for name in ("dense", "channel", "outlook", "window", "halo", "bottleneck")
    )
    lse, of_windows = jnp.zeros((BATCH, 4, 6, 4)), jnp.zeros((BATCH, 2, 3, 2, 9))
    yield partial(attn.dense_maps, *dense[:2], lse), r"lse \(2, 4, 6, 4\): must be \(2, 7, 4\), one number for each"
    yield partial(attn.outlook_maps, outlook[0], lse, scale=0.3), r"lse .* must be \(2, 2, 3, 2, 9\)"
    yield partial(attn.outlook_maps, outlook[0], of_windows, scale=None), "scale=None; allowed: that of the call"
    for one, said in ((8, "channel 8: there are 8, 0 to 7"), (-1, "channel -1"), (0.5, "channels .*must be integers")):
        yield partial(attn.channel_maps, *channel[:2], jnp.zeros((BATCH, 8, 3)), [one]), said
    windows = partial(attn.window_maps, *window[:2], **operators.WINDOW)
    blocks = partial(attn.halo_maps, *halo[:2], **operators.HALO)
    for run, what, count in ((windows, "window", 4), (blocks, "block", 6)):
        yield partial(run, lse[:1], [0]), "lse"
        yield partial(run, lse, [count]), f"{what} {count}: there are {count}"
        yield partial(run, lse, [1.0]), f"{what}s float64.*must be integers"
    tables = {"height_rel": bottleneck[3], "width_rel": bottleneck[4]}
    for place, said in (([4, 0], r"query \[4, 0\] is not on the map \(4, 6\)"), ([0.0, 1.0], "must be integers")):
        yield partial(attn.bottleneck_maps, *bottleneck[:2], lse, queries=np.array([place]), **tables), said


def test_maps_of_what_there_is_not_are_one_line():
    for run, message in no_maps():
        with pytest.raises(ValueError, match=message) as error:
            run()
        assert "\n" not in str(error.value)


# --- derivatives ------------------------------------------------------------------------------------------------------


@each_operator
def test_the_reference_has_derivatives_of_every_kind(name):
    """Along a line, from the gradients of the implementation that runs by default and their differences."""
    case = CASES[name]
    arrays, steps = case.arrays(), case.arrays(seed=1)
    total = loss(name, return_lse=True, implementation="reference")

    @jax.jit
    def derivatives(arrays, steps):
        def along(by):
            return total(*(x + by * step for x, step in zip(arrays, steps, strict=True)))

        _, first = jax.jvp(along, (0.0,), (1.0,))
        second = [jax.jacfwd(jax.jacfwd(along)), jax.jacfwd(jax.grad(along)), jax.grad(jax.grad(along))]
        return first, jax.jacfwd(along)(0.0), [derivative(0.0) for derivative in second]

    def slope(by):
        _, gradients = gradient(name)(*(x + by * step for x, step in zip(arrays, steps, strict=True)))
        return sum(float(jnp.vdot(one, step)) for one, step in zip(gradients, steps, strict=True))

    first, again, second = derivatives(arrays, steps)
    np.testing.assert_allclose([first, again], slope(0.0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(second, second[0], rtol=1e-4)
    np.testing.assert_allclose(second[0], (slope(1e-3) - slope(-1e-3)) / 2e-3, rtol=2e-3)


WITH_ONE_DERIVATIVE = ["dense", "neighborhood", "token_neighborhood", "window", "outlook", "routed", "bilevel_routing"]


@pytest.mark.parametrize("name", WITH_ONE_DERIVATIVE)
def test_other_derivatives_are_refused_in_one_sentence(name):
    """Where a kernel may run on some platform, here in bfloat16."""
    arrays = CASES[name].arrays(dtype=jnp.bfloat16)
    of_operator = "neighborhood" if name == "token_neighborhood" else name.replace("bilevel_routing", "routed")
    message = f"^{of_operator}_attention is differentiable in reverse mode, once; implementation='reference' has"
    forward = jax.jit(lambda *arrays: jax.jvp(loss(name), arrays, arrays)[1]).trace(*arrays)
    with pytest.raises(ValueError, match=message):
        forward.lower()
    reference = loss(name, implementation="reference")
    jax.jit(lambda *arrays: jax.jvp(reference, arrays, arrays)[1]).trace(*arrays).lower()
    if name == "neighborhood":
        more = loss(name, dropout=0.1, key=jax.random.key(0))
        forward = jax.jit(lambda *arrays: jax.jvp(more, arrays, arrays)[1]).trace(*arrays)
        with pytest.raises(ValueError, match=message):
            forward.lower()


# --- programs for other platforms -------------------------------------------------------------------------------------


@each_operator
@pytest.mark.parametrize("looked", [False, True])
def test_a_program_for_cpus_and_tpus_is_made_here_and_multiplies_float32_in_full(name, looked):
    """With gradients. Products of kernels are not seen here, but in their own tests."""
    case = CASES[name]
    arrays = case.arrays()
    edit = {"edit": lambda site, value: value} if looked else {}
    total = jax.value_and_grad(loss(name, return_lse=True, **edit), tuple(range(len(arrays))))
    exported = jax.export.export(jax.jit(total), platforms=("cpu", "tpu"))(*arrays)
    products = re.findall(r"stablehlo\.dot_general.*", exported.mlir_module())
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in one for one in products if "xf32>" in one.partition("->")[0])
    if not looked:
        close(exported.call(*arrays), gradient(name)(*arrays))


# --- half precision ---------------------------------------------------------------------------------------------------


@each_operator
def test_bfloat16_rounds_inputs_and_results_and_no_logits(name):
    """The scale is no power of two: on queries of that type it would round them once more."""
    case = CASES[name]
    run = jax.jit(case.bound(return_lse=True))
    (low, lse), (full, exact) = (run(*case.arrays(dtype=dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    assert (low.dtype, lse.dtype, exact.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(lse, exact, rtol=2e-6, atol=1e-5)
    # Rounded are probabilities, before they weigh values, and the result.
    half = float(jnp.finfo(jnp.bfloat16).eps) / 2
    largest = float(jnp.abs(case.arrays()[1 if name == "outlook" else 2]).max())
    windows = 4 if name == "outlook" else 1
    assert float(jnp.abs(low.astype(jnp.float32) - full).max()) <= half * windows * largest


def test_windows_of_outlook_attention_are_summed_before_they_are_rounded():
    """As in float32 with the same rounded probabilities; where up to four windows overlap."""
    logits, v = CASES["outlook"].arrays(dtype=jnp.bfloat16)

    def rounded(site, value):
        return value.astype(jnp.bfloat16).astype(jnp.float32) if site == "probs" else value

    found = jax.jit(attn.outlook_attention)(logits, v)
    wide = jax.jit(partial(attn.outlook_attention, edit=rounded))(*(x.astype(jnp.float32) for x in (logits, v)))
    # A sum that lies between two numbers of the type may go either way by its order.
    assert float((found == wide.astype(jnp.bfloat16)).mean()) > 0.98


@pytest.mark.parametrize("name", ["dense", "neighborhood"])
def test_dropout_scales_by_a_number_that_is_not_rounded(name):
    """1 / 0.9 is 1.1111, and 1.1094 in bfloat16, which is 16e-4 less. With one-hot values results are the map."""
    shape = (9,) if name == "dense" else (4, 6)
    one_hot = jnp.broadcast_to(jnp.eye(np.prod(shape)).reshape(1, *shape, 1, -1), (BATCH, *shape, 2, np.prod(shape)))

    def maps(dtype, **options):
        q, k, _, *rest = CASES[name].arrays(dtype=dtype)
        return np.asarray(jax.jit(CASES[name].bound(**options))(q, k, one_hot.astype(dtype), *rest), np.float64)

    whole = maps(jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = maps(dtype, dropout=0.1, key=jax.random.key(0))
        ratio = found[found > 0] / whole[found > 0]
        assert len(ratio) > 400
        assert abs(ratio.mean() * 0.9 - 1) < 4e-4


# --- what goes with a call --------------------------------------------------------------------------------------------


def asked(name):
    """What may go with a call: options, and what an implementation without it says."""
    yield {"edit": lambda site, value: value}, "look at the maps"
    yield {"dropout": 0.1, "key": jax.random.key(0)}, "dropout"
    if "mask" in CASES[name].takes:
        yield {"mask": attn.causal()}, "mask"
    if "weights" in CASES[name].takes:
        yield {"weights": jnp.ones((BATCH, 6, 2))}, "weights"


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].kernel])
def test_a_kernel_that_has_not_what_is_asked_is_a_fallback_and_is_not_run(name):
    case = CASES[name]
    kernel, platform = case.kernel
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in case.arrays()]
    for options, what in asked(name):
        run = case.bound(**options)
        choice = explain(run, *arrays).calls[0].choices[platform]
        assert choice.fallback_from is not None
        assert f"no {what}" in choice.refused[kernel], (what, choice)
        with pytest.raises(ValueError, match=f"implementation='{kernel}' of .*no {what}"):
            jax.eval_shape(case.bound(implementation=kernel, **options), *arrays)
        with fallback("error"):
            traced = jax.jit(run).trace(*arrays)
            with pytest.raises(ValueError, match=f"on {platform}: .*no {what}"):
                traced.lower(lowering_platforms=(platform,))
        # The reference has everything.
        jax.eval_shape(case.bound(implementation="reference", **options), *arrays)


# --- nothing at all, and fewer key heads ------------------------------------------------------------------------------


@each_operator
def test_a_batch_of_nothing_gives_nothing_and_no_gradients(name):
    case = CASES[name]
    arrays = case.arrays(batch=0)
    expected = jax.eval_shape(case.bound(return_lse=True), *case.arrays())
    for options in ({}, {"edit": lambda site, value: value}, {"implementation": "reference"}):
        found = case.bound(0, return_lse=True, **options)(*arrays)
        assert [(x.shape, x.dtype) for x in found] == [((0, *x.shape[1:]), x.dtype) for x in expected]
    _, gradients = jax.jit(jax.value_and_grad(loss(name), tuple(range(len(arrays)))))(*arrays)
    assert [x.shape for x in gradients] == [x.shape for x in arrays]
    assert not any(np.any(x) for x in gradients)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].grouped])
def test_fewer_key_heads_are_repeated_ones(name):
    """Query head h reads key head `h // 2`, and its gradients add up."""
    case = CASES[name]
    arrays = case.arrays()
    own = [key in case.grouped for key in case.shapes]
    repeated = [jnp.repeat(x, 2, axis=-2) if flag else x for x, flag in zip(arrays, own, strict=True)]
    value, gradients = gradient(name)(*repeated)
    gradients = [
        x.reshape(*x.shape[:-2], -1, 2, x.shape[-1]).sum(-2) if flag else x
        for x, flag in zip(gradients, own, strict=True)
    ]
    close((value, gradients), gradient(name)(*arrays))


# --- what is wrong ----------------------------------------------------------------------------------------------------


def with_first(change):
    """The first array changed: queries, or logits."""
    return lambda arrays: [change(arrays[0]), *arrays[1:]]


def with_second(change):
    """Keys, or the values of outlook attention."""
    return lambda arrays: [arrays[0], change(arrays[1]), *arrays[2:]]


ARRAYS = {
    "an example too few": with_second(lambda x: x[:1]),
    "an axis too few": with_first(lambda x: x[0]),
    "an axis too many": with_second(lambda x: x[None]),
    "two rows too few": with_second(lambda x: x[:, 2:]),
    "no rows": lambda arrays: [x if x.ndim < 4 else x[:, :0] for x in arrays],
    "another width": with_second(lambda x: x[..., :5] if x.ndim != 5 or x.shape[-1] != 16 else x[..., :1, :]),
    "heads that do not divide": with_first(lambda x: x[..., : x.shape[-2] - 1, :] if x.ndim < 6 else x[:, :, :, :1]),
    "two types": with_second(lambda x: x.astype(jnp.bfloat16)),
    "integers": lambda arrays: [x.astype(int) for x in arrays],
    "numbers of 64 bits": lambda arrays: [np.asarray(x, np.float64) for x in arrays],
}
LEGAL = "allowed: |must |they are |do not fit|at least one"


@each_operator
@pytest.mark.parametrize("what", ARRAYS)
def test_arrays_that_do_not_belong_together_are_one_line(name, what):
    case = CASES[name]
    with pytest.raises(ValueError, match=LEGAL) as error:
        case.bound()(*ARRAYS[what](case.arrays()))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


COUNTS = {
    "neighborhood": {"stride": (0, 1.0, True, 4), "dilation": (0, 1.5, "2"), "is_causal": (1, "no")},
    "token_neighborhood": {"stride": (0, 1.0), "dilation": (0, 1.5), "is_causal": (1,)},
    "window": {"window": (0, 2.0, (2, 2.5), "23", (2, 3, 4), (5, 3)), "shift": (0.5, -1, (2, 0), (1, 1, 1))},
    "halo": {"block_size": (0, 2.0, True, 3, "2"), "halo_size": (-1, 1.0, None), "stride": (0, 1.0, 2)},
    "outlook": {"window": (0, 2, 3.0, True, "3"), "stride": (0, 4, 2.0, None)},
    "routed": {"regions": (0, 2.0, (3, 3), (2, 3, 1), "23")},
    "bilevel_routing": {"regions": (0, 2.0, (3, 3)), "topk": (0, 7, 2.0, True, None)},
}
RATHER = {
    "scale": ("big", True, 1j, [1.0]),
    "dropout": (1.0, -0.1, "0.1", None, True),
    "implementation": ("xlaa", 3),
    "edit": (lambda site, value: None, lambda site, value: value[..., :1], lambda site, value: 1.0),
}


@each_operator
def test_an_argument_that_is_no_such_thing_is_one_line_that_names_it(name):
    case = CASES[name]
    arrays = case.arrays()
    for argument, values in {**RATHER, **COUNTS.get(name, {})}.items():
        for value in values:
            with pytest.raises(ValueError, match=argument) as error:
                case.bound(**{argument: value})(*arrays)
            assert "\n" not in str(error.value), (argument, value)
    with pytest.raises(ValueError, match="dropout needs a key"):
        case.bound(dropout=0.1)(*arrays)


MASKS = {
    "numbers": (jnp.zeros((5, 5)), r"mask float32\[5, 5\]: must be boolean.*\(0 and -inf\) is a bias"),
    "three axes": (
        jnp.ones((2, 5, 5), bool),
        r"mask \[2, 5, 5\]: must be \[queries, keys\] or \[batch, heads, queries",
    ),
    "other tokens": (jnp.ones((5, 6), bool), r"mask \[5, 6\]: must be \[queries, keys\], which is"),
    "other heads": (jnp.ones((1, 3, 1, 1), bool), r"mask \[1, 3, 1, 1\]: must be .* axes of 1 are repeated"),
    "other lengths": (attn.lengths([1, 2, 3]), r"lengths \[3\]: must be one for each example, \[2\]"),
}


@pytest.mark.parametrize("name", ["dense", "token_neighborhood"])
@pytest.mark.parametrize("what", MASKS)
def test_a_mask_that_may_mean_something_else_is_one_line(name, what):
    mask, message = MASKS[what]
    with pytest.raises(ValueError, match=message) as error:
        CASES[name].bound(mask=mask)(*CASES[name].arrays())
    assert "\n" not in str(error.value)


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.multiprocess
def test_in_meshes_of_others_operators_run_or_say_why_not():
    found = simulated.run(4, ROOT / "tests" / "operators_mesh_job.py")
    assert found.keys() == CASES.keys()
    for name, result in found.items():
        assert result["inside"] < 1e-5, name
        assert result["eager"] < 1e-5, name
        said = r"^\w+_attention under a mesh with explicit axes \(data, tensor\): make the mesh with axis_types="
        assert re.match(said, result["said"]), (name, result["said"])
        assert "\n" not in result["said"]
