"""Optimizers: against optax and hand-written references, and stacked against unrolled."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.core.state import stack, unstack
from training.optim import from_optax, muon, optim

DEPTH = 4
NAMES = tuple(optim.DEFAULTS)

# Few different shapes, since every operation is compiled once per shape.
BLOCK = {"norm.scale": (4,), "qkv.kernel": (4, 12), "qkv.bias": (12,), "rel_pos_table": (1, 4)}
SHAPES = {
    "pos_embed": (1, 4),
    **{f"blocks.{i}.{name}": shape for i in range(DEPTH) for name, shape in BLOCK.items()},
    "head.kernel": (4, 12),
    "head.bias": (12,),
}
# Leaves of both kinds of stack in one model: all layers, and every second layer.
STACKED = [name for name in SHAPES if not name.startswith("blocks.")]
STACKED += ["blocks.[0::1].norm.scale", "blocks.[0::1].qkv.kernel"]
STACKED += [f"blocks.[{i}::2].{name}" for i in range(2) for name in ("qkv.bias", "rel_pos_table")]


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """These tests compile many small programs and run each a few times."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def settings(**changes):
    values = {
        "name": "adamw",
        "learning_rate": 0.1,
        "weight_decay": 0.3,
        "weight_decay_on": "matrices",
        "b1": None,
        "b2": None,
        "eps": None,
        "momentum": None,
        "nesterov": None,
        "mu_dtype": "float32",
        "layer_decay": 1.0,
        "freeze": (),
        "clip_norm": 0.0,
        "options": {},
    }
    assert changes.keys() <= values.keys()
    return SimpleNamespace(**values | changes)


def constant(rate=0.1):
    return lambda step: jnp.asarray(rate, jnp.float32)


def normal(seed, scale=1.0, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return {name: (scale * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def run(cfg, params, steps=3, schedule=None, like=None, make=optim.build, **kwargs):
    """Parameters (unrolled), state and the last aux after some steps with gradients that depend on the step only."""
    shapes = {name: value.shape for name, value in params.items()}
    arrange = (lambda flat: stack(flat, like=like)) if like else dict
    params = jax.tree.map(jnp.asarray, arrange(params))
    optimizer = make(cfg, params, schedule or constant(), **kwargs)
    state, aux = optimizer.init(params), None
    for step in range(steps):
        grads = jax.tree.map(jnp.asarray, arrange(normal(100 + step, shapes=shapes)))
        # One operation at a time: nothing to compile anew, and Muon's loop would be.
        with jax.disable_jit(any("_adamw" in label for label in optimizer.rules)):
            updates, state, aux = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return unstack(params), state, aux


def run_optax(transformation, params, steps=3):
    shapes = {name: value.shape for name, value in params.items()}
    params = jax.tree.map(jnp.asarray, params)
    state = transformation.init(params)
    for step in range(steps):
        with jax.disable_jit():
            updates, state = transformation.update(normal(100 + step, shapes=shapes), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(got, expected, rtol=1e-6, atol=1e-6):
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=rtol, atol=atol, err_msg=name)


# Against other implementations


def decayed_by_timm(name):
    return len(SHAPES[name]) > 1 and not name.endswith((".bias", "pos_embed", "rel_pos_table"))


def test_adamw_is_optax_adamw():
    mask = {name: decayed_by_timm(name) for name in SHAPES}
    got, *_ = run(settings(), normal(0))
    assert_close(got, run_optax(optax.adamw(0.1, weight_decay=0.3, mask=mask), normal(0)))


def test_lion_is_optax_lion():
    mask = {name: name.endswith("kernel") for name in SHAPES}
    got, *_ = run(settings(name="lion", weight_decay_on="kernels"), normal(0))
    assert_close(got, run_optax(optax.lion(0.1, b1=0.9, b2=0.99, weight_decay=0.3, mask=mask), normal(0)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_optax_sgd_plus_decay(nesterov):
    cfg = settings(name="sgd", momentum=0.8, nesterov=nesterov, weight_decay_on="all")
    chain = optax.chain(optax.trace(0.8, nesterov), optax.add_decayed_weights(0.3), optax.scale(-0.1))
    assert_close(run(cfg, normal(0))[0], run_optax(chain, normal(0)))


@pytest.mark.parametrize(
    ("name", "key", "value", "owners"),
    [
        ("adamw", "nesterov", False, "sgd, muon"),
        ("sgd", "b1", 0.9, "adamw, lamb, lion, muon"),
        ("lion", "eps", 1e-8, ""),
    ],
)
def test_a_key_of_another_optimizer_is_refused(name, key, value, owners):
    with pytest.raises(ValueError, match=rf"config.optim.{key}={value}: {name} has none; it is for {owners}"):
        optim.build(settings(name=name, **{key: value}), normal(0), constant())


def test_sgd_without_momentum_has_no_state():
    got, state, _ = run(settings(name="sgd", momentum=0.0, weight_decay=0.0), normal(0))
    assert state["rules"] == {"main": {}}
    assert_close(got, run_optax(optax.sgd(0.1), normal(0)))


def test_muon_without_look_ahead_is_optax_muon():
    """On matrices inside blocks; optax is shown the fused kernel as three and the convolution as a matrix."""
    shapes = {"blocks.0.qkv.kernel": (4, 12), "blocks.0.mlp.fc1.kernel": (4, 8), "blocks.0.conv.kernel": (2, 2, 3, 4)}
    dims = optax.contrib.MuonDimensionNumbers

    class Shown:
        """Flat dictionary in the shapes given to optax, and back."""

        def __init__(self):
            self.axes = {n: dims((0, 1, 2), 3) if "conv" in n else dims(0, 2) if "qkv" in n else dims() for n in shapes}
            self.shapes = {n: (4, 3, 4) if "qkv" in n else shape for n, shape in shapes.items()}

        def muon(self):
            inner = optax.contrib.muon(
                0.1,
                beta=0.95,
                nesterov=False,
                weight_decay=0.3,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=self.axes,
            )

            def view(tree):
                return {n: jnp.reshape(x, self.shapes[n]) for n, x in tree.items()}

            def update(grads, state, params):
                updates, state = inner.update(view(grads), state, view(params))
                return {n: x.reshape(shapes[n]) for n, x in updates.items()}, state

            return optax.GradientTransformation(lambda params: inner.init(view(params)), update)

    params = normal(0, shapes=shapes)
    cfg = settings(name="muon", nesterov=False)
    assert_close(run(cfg, params)[0], run_optax(Shown().muon(), params), atol=5e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_has_the_momentum_of_its_author(nesterov):
    """The published rule in float64: the buffer is a plain running mean, the look-ahead mixes gradient and buffer."""
    name, shape, beta, rate = "blocks.0.fc.kernel", (4, 8), 0.95, 0.1

    def orthogonal(x):
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x

    params, buffer = normal(0, shapes={name: shape}), 0.0
    expected = params[name].astype(np.float64)
    for step in range(3):
        grad = normal(100 + step, shapes={name: shape})[name].astype(np.float64)
        buffer = beta * buffer + (1 - beta) * grad
        direction = orthogonal((1 - beta) * grad + beta * buffer if nesterov else buffer)
        expected = expected - rate * (0.2 * np.sqrt(max(shape)) * direction + 0.3 * expected)
    got, state, _ = run(settings(name="muon", nesterov=nesterov), params)
    assert_close(got, {name: expected}, rtol=1e-5, atol=1e-5)
    assert_close(state["rules"]["main"]["mu"], {name: buffer}, rtol=1e-5, atol=1e-6)


def test_muon_leaves_the_rest_to_adamw():
    got, state, _ = run(settings(name="muon"), normal(0))
    adamw, *_ = run(settings(), normal(0))
    rest = [name for name in SHAPES if name not in state["rules"]["main"]["mu"]]
    assert set(SHAPES) - set(rest) == {f"blocks.{i}.qkv.kernel" for i in range(DEPTH)}
    assert_close({name: got[name] for name in rest}, {name: adamw[name] for name in rest})


def test_muon_updates_are_orthogonal_by_part_of_qkv():
    params = normal(0, shapes={"blocks.0.qkv.kernel": (4, 12)})
    got, *_ = run(settings(name="muon", weight_decay=0.0), params, steps=1)
    moved = (got["blocks.0.qkv.kernel"] - params["blocks.0.qkv.kernel"]) / (0.1 * 0.2 * np.sqrt(4))
    for part in np.split(np.asarray(moved), 3, axis=1):
        values = np.linalg.svd(part, compute_uv=False)
        assert values.min() > 0.4
        assert values.max() < 1.3


@pytest.mark.parametrize(
    ("name", "shape", "taken"),
    [
        ("blocks.3.mlp.fc1.kernel", (4, 8), True),
        ("blocks.[1::2].mlp.fc1.kernel", (6, 4, 8), True),
        ("stages.1.blocks.[0::1].conv.kernel", (6, 3, 3, 4, 8), True),
        ("blocks.[0::1].depthwise.kernel", (6, 3, 3, 1, 8), False),
        ("blocks.[0::1].gate.kernel", (6, 8), False),
        ("blocks.0.attn.rel_pos_table", (7, 4), False),
        ("patch_embed.kernel", (2, 2, 3, 8), False),
        ("head.kernel", (8, 5), False),
    ],
)
def test_muon_takes_matrices_inside_blocks(name, shape, taken):
    assert muon.takes(name, jax.ShapeDtypeStruct(shape, jnp.float32)) == taken


def lamb_by_hand(weight, grads, rate, decay, b1=0.9, b2=0.999, eps=1e-6):
    """Algorithm 2 of arXiv:1904.00962 in float64, phi the identity."""
    x, m, v = weight.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g.astype(np.float64)
        v = b2 * v + (1 - b2) * np.square(g, dtype=np.float64)
        r = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * x
        x = x - rate * np.linalg.norm(x) / np.linalg.norm(r) * r
    return x


@pytest.mark.parametrize("like", [None, STACKED])
def test_lamb_is_the_paper_layer_by_layer(like):
    # Layers of very different norms, so that the ratio of a whole stack is far from that of a layer.
    params = {n: x * (1 + 5 * int(n.split(".")[1])) if n.startswith("blocks.") else x for n, x in normal(0).items()}
    got, *_ = run(settings(name="lamb", weight_decay_on="kernels"), params, steps=2, like=like)
    grads = [normal(100), normal(101)]
    expected = {
        name: lamb_by_hand(params[name], [g[name] for g in grads], 0.1, 0.3 * name.endswith("kernel"))
        for name in SHAPES
    }
    assert_close(got, expected, rtol=1e-5, atol=1e-5)


# Any optimizer of optax


def of_optax(name, rate=0.1, decay=0.3):
    """The optimizer as optax itself gives it, with our weight decay where it has none with a mask."""
    mask = {leaf: decayed_by_timm(leaf) for leaf in SHAPES}
    match name:
        case "lamb":
            return optax.lamb(rate, eps=1e-3, weight_decay=decay, mask=mask)
        case "sm3":
            inner = optax.sm3(rate, momentum=0.5)
        case "adafactor":
            inner = optax.adafactor(rate, min_dim_size_to_factor=4)
        case "prodigy":
            inner = optax.contrib.prodigy(rate)
    decoupled = optax.chain(optax.add_decayed_weights(decay, mask), optax.scale(-rate))

    def update(grads, state, params):
        step, state = inner.update(grads, state, params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.apply_updates(step, decoupled.update(zeros, decoupled.init(params), params)[0]), state

    return optax.GradientTransformation(inner.init, update)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lamb", {"eps": 1e-3}),  # norms of each layer, decay inside
        ("sm3", {"momentum": 0.5}),  # takes no schedule
        ("adafactor", {"min_dim_size_to_factor": 4}),  # factors of each layer
        ("prodigy", {}),  # all leaves together
    ],
)
def test_optimizers_of_optax_are_optax_stacked_or_not(name, options):
    cfg = settings(name=f"optax:{name}", options=options)
    expected = run_optax(of_optax(name), normal(0), steps=2)
    got, state, _ = run(cfg, normal(0), steps=2)
    stacked, stacked_state, _ = run(cfg, normal(0), steps=2, like=STACKED)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert_close(stacked, expected, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(stacked_state)


def test_optimizers_of_optax_follow_the_schedule_the_factors_and_frozen_layers():
    def schedule(step):
        return jnp.asarray([0.0, 0.5])[step]

    cfg = settings(name="optax:sgd", freeze=("blocks.1",), layer_decay=0.5, weight_decay_on="all", clip_norm=1e-3)
    ours = settings(
        name="sgd", momentum=0.0, freeze=("blocks.1",), layer_decay=0.5, weight_decay_on="all", clip_norm=1e-3
    )
    got, expected = (run(c, normal(0), steps=2, schedule=schedule, like=STACKED)[0] for c in (cfg, ours))
    assert_close(got, expected)
    groups = {"head": ("head", {"name": "optax:sgd", "learning_rate": 0.2, "options": {}})}
    twice, *_ = run(settings(weight_decay=0.0), normal(0), steps=1, groups=groups)
    np.testing.assert_allclose(twice["head.bias"], normal(0)["head.bias"] - 0.2 * normal(100)["head.bias"], rtol=1e-5)


def test_every_optimizer_of_optax_can_be_built_or_says_why_not():
    params = stack(normal(0), like=STACKED)
    names = [*from_optax._optimizers(), *from_optax._REFUSED]
    assert {"adam", "adan", "lion", "muon", "prodigy", "rprop", "lbfgs"} < set(names)
    for name in names:
        if name in from_optax._REFUSED:
            with pytest.raises(ValueError, match=f"^config.optim.name=optax:{name}: it (needs|trains)"):
                optim.build(settings(name=f"optax:{name}"), params, constant())
        else:
            optim.build(settings(name=f"optax:{name}"), params, constant())


# Stacked against unrolled

FREEZES = ((), ("blocks.[01]",), (r".*\.bias", "blocks.1", "pos_embed"), (r"blocks\.(0|3)\.qkv", "head"))


@pytest.mark.parametrize(
    ("name", "weight_decay_on"),
    # What decays is decided in one place for all of them.
    [*((name, "matrices") for name in NAMES), ("adamw", "kernels"), ("lion", "all")],
)
def test_stacked_takes_the_same_step(name, weight_decay_on):
    for layer_decay, freeze, clip_norm in itertools.product((1.0, 0.7), FREEZES, (0.0, 2.0)):
        cfg = settings(
            name=name, weight_decay_on=weight_decay_on, layer_decay=layer_decay, freeze=freeze, clip_norm=clip_norm
        )
        expected, state, aux = run(cfg, normal(0), steps=2)
        got, stacked_state, stacked_aux = run(cfg, normal(0), steps=2, like=STACKED)
        assert_close(got, expected)
        np.testing.assert_allclose(stacked_aux.grad_norm, aux.grad_norm, rtol=1e-6)
        assert_same_state(stacked_state, state)


def assert_same_state(stacked_state, state):
    """The same names once unrolled (so that a checkpoint serves both), the same numbers, and scalars besides."""
    assert stacked_state["rules"].keys() == state["rules"].keys()
    for label, parts in state["rules"].items():
        for part, value in parts.items():
            other = stacked_state["rules"][label][part]
            if isinstance(value, dict):
                assert_close(unstack(other), value)
            else:
                assert value.shape == other.shape == ()


def test_stacked_groups_take_the_same_step():
    groups = {
        "early": ("blocks.[01]", {"name": "lion", "learning_rate": 0.02, "weight_decay": 0.0}),
        "kernels": (r".*\.kernel", {"name": "muon", "clip_norm": 1.0, "layer_decay": 0.5}),
    }
    cfg = settings(name="lamb", freeze=(r"blocks\.3\.norm",))
    expected, state, _ = run(cfg, normal(0), groups=groups)
    got, stacked_state, _ = run(cfg, normal(0), groups=groups, like=STACKED)
    assert_close(got, expected, atol=2e-6)
    assert_same_state(stacked_state, state)
    lion, *_ = run(settings(name="lion", learning_rate=0.02, weight_decay=0.0), normal(0), schedule=constant(0.02))
    early = [name for name in SHAPES if name.startswith(("blocks.0.", "blocks.1."))]
    assert_close({n: got[n] for n in early}, {n: lion[n] for n in early})


def test_layer_decay_scales_rate_and_decay_by_layer():
    """Against BEiT's numbers for depth 4: 0 before the blocks, i + 1 for block i, 5 after them with factor 1."""
    cfg = settings(name="sgd", momentum=0.0, weight_decay_on="all", layer_decay=0.5)
    params, grads = normal(0), normal(100)
    layers = {n: 0 if n == "pos_embed" else int(n.split(".")[1]) + 1 if "blocks" in n else 5 for n in SHAPES}
    expected = {n: params[n] - 0.1 * 0.5 ** (5 - layers[n]) * (grads[n] + 0.3 * params[n]) for n in SHAPES}
    assert_close(run(cfg, params, steps=1, like=STACKED)[0], expected)
    assert_close(run(cfg, params, steps=1, like=STACKED, layer_of=layers.get, num_layers=5)[0], expected)


def equations(jaxpr):
    inner = [e for eqn in jaxpr.eqns for v in eqn.params.values() if (e := getattr(v, "jaxpr", None)) is not None]
    return len(jaxpr.eqns) + sum(equations(getattr(one, "jaxpr", one)) for one in inner)


@pytest.mark.parametrize("name", NAMES)
def test_program_does_not_grow_with_depth(name):
    def size(depth):
        params = {f"blocks.[0::1].{n}": jax.ShapeDtypeStruct((depth, *s), jnp.float32) for n, s in BLOCK.items()}
        cfg = settings(name=name, layer_decay=0.7, freeze=("blocks.0",), clip_norm=1.0)
        optimizer = optim.build(cfg, params, constant())
        return equations(jax.make_jaxpr(optimizer.update)(params, jax.eval_shape(optimizer.init, params), params).jaxpr)

    assert size(4) == size(48)


# Frozen parameters, clipping, state


@pytest.mark.parametrize("like", [None, STACKED])
def test_frozen_parameters_stay_bit_for_bit_and_have_no_moments(like):
    params = normal(0)
    got, state, aux = run(settings(freeze=("blocks.[0-2]", "head"), clip_norm=1.0), params, like=like)
    for name, value in params.items():
        frozen = name.startswith(("blocks.0.", "blocks.1.", "blocks.2.", "head."))
        assert (np.asarray(got[name]) == value).all() == frozen, name
        for moment in ("mu", "nu"):
            assert (name in unstack(state["rules"]["main"][moment])) != frozen
    free = [name for name in params if (np.asarray(got[name]) != params[name]).any()]
    grads = normal(102)
    np.testing.assert_allclose(aux.grad_norm, np.sqrt(sum(np.sum(grads[n] ** 2) for n in free)), rtol=1e-6)


def test_frozen_gradients_may_be_anything():
    params = jax.tree.map(jnp.asarray, stack(normal(0), like=STACKED))
    optimizer = optim.build(settings(freeze=("blocks.1", "head"), clip_norm=1.0), params, constant())
    grads = {n: np.full_like(g, np.nan) if n.startswith("blocks.1.") else g for n, g in normal(100).items()}
    grads = {n: g for n, g in stack(grads, like=STACKED).items() if not n.startswith("head")}
    assert "head.kernel" not in optimizer.trainable
    updates, state, aux = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state, aux)))
    assert not aux.bad_groups.any()


def test_clip_scales_all_gradients_by_one_factor():
    cfg = settings(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=0.5)
    params, grads = normal(0), normal(100)
    got, _, aux = run(cfg, params, steps=1)
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    np.testing.assert_allclose(aux.grad_norm, norm, rtol=1e-6)
    assert_close(got, {n: params[n] - 0.1 * grads[n] * 0.5 / norm for n in params})
    unclipped, *_ = run(settings(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=2 * norm), params, steps=1)
    assert_close(unclipped, {n: params[n] - 0.1 * grads[n] for n in params})


def test_schedule_is_followed_and_reported():
    def schedule(step):
        return jnp.asarray([0.0, 0.5, 0.25])[step]

    cfg = settings(name="sgd", momentum=0.0, weight_decay=0.0)
    params = normal(0)
    got, state, aux = run(cfg, params, schedule=schedule)
    assert int(state["count"]) == 3
    assert float(aux.learning_rate) == 0.25
    assert_close(got, {n: params[n] - 0.5 * normal(101)[n] - 0.25 * normal(102)[n] for n in params}, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_first_moment_may_be_bfloat16(name):
    _, state, _ = run(settings(name=name, mu_dtype="bfloat16"), normal(0), like=STACKED)
    got, *_ = run(settings(name=name, mu_dtype="bfloat16"), normal(0))
    full, *_ = run(settings(name=name), normal(0))
    parts = state["rules"]["main"]
    assert all(x.dtype == jnp.bfloat16 for x in parts["trace" if name == "sgd" else "mu"].values())
    assert all(x.dtype == jnp.float32 for x in parts.get("nu", {}).values())
    assert all(got[n].dtype == jnp.float32 for n in got)
    if name != "lion":  # whose sign turns with a rounding
        assert_close(got, full, rtol=0.05, atol=0.05)


def test_bad_groups_are_found_by_block():
    params = stack(normal(0), like=STACKED)
    optimizer = optim.build(settings(freeze=("pos_embed",)), params, constant())
    assert optimizer.group_names == ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "head", "pos_embed")
    assert optim.build(settings(), normal(0), constant()).group_names == optimizer.group_names
    grads = dict(params)
    name = "blocks.[1::2].qkv.bias"
    grads[name] = grads[name].copy()
    grads[name][1, 2] = np.inf
    grads["head.bias"] = np.full_like(grads["head.bias"], np.nan)
    _, _, aux = optimizer.update(grads, optimizer.init(params), params)
    assert [g for g, bad in zip(optimizer.group_names, aux.bad_groups, strict=True) if bad] == ["blocks.3", "head"]


# What the user can get wrong


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "adamww"}, "config.optim.name.*'adamww'.*muon.*nearest: adamw"),
        ({"name": "optax:adamm"}, "config.optim.name=optax:NAME.*'adamm'.*nearest: adam$"),
        ({"name": "optax:adam", "options": {"b3": 1}}, "options of optax:adam: unknown name 'b3'; .*nearest: b[12]"),
        ({"name": "optax:adam", "options": {"b1": "x"}}, "optax:adam with options .*optax says: TypeError"),
        ({"name": "optax:adamw", "options": {"mask": 1}}, "options.mask: comes from config.optim.weight_decay_on"),
        ({"name": "optax:adam", "b1": 0.5}, "config.optim.b1: optax:adam takes config.optim.options"),
        ({"options": {"b1": 1}}, "config.optim.options: 'b1' is given, and adamw takes none"),
        ({"weight_decay_on": "kernel"}, "config.optim.weight_decay_on.*nearest: kernels"),
        ({"mu_dtype": "float16"}, "config.optim.mu_dtype.*nearest: bfloat16|config.optim.mu_dtype.*nearest: float32"),
        ({"freeze": ("block.1",)}, "config.optim.freeze: 'block.1' matches no parameter.*nearest: blocks.1"),
        ({"freeze": ("bias",)}, "config.optim.freeze: 'bias' matches no parameter"),
        ({"freeze": ("blocks.1", "(")}, r"config.optim.freeze: '\(' is not a regular expression"),
        ({"freeze": (".*",)}, "config.optim.freeze.*leaves no parameter to train"),
        ({"layer_decay": 0.0}, "config.optim.layer_decay: 0.0 is not a positive number"),
    ],
)
def test_errors_are_one_line(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        optim.build(settings(**changes), stack(normal(0), like=STACKED), constant())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"main": ("head", {})}, "label 'main' is taken"),
        ({"critic": ("head", {"learning_rat": 1.0})}, "optimizers.critic.*'learning_rat'.*nearest: learning_rate"),
        ({"critic": ("heads", {})}, "optimizers.critic: 'heads' matches no parameter.*nearest: head"),
    ],
)
def test_errors_in_the_optimizers_of_a_task(groups, words):
    with pytest.raises(ValueError, match=words):
        optim.build(settings(), normal(0), constant(), groups=groups)


def test_a_rate_of_zero_has_no_multiples():
    groups = {"critic": ("head", {"learning_rate": 1.0})}
    with pytest.raises(ValueError, match="learning_rate: 0, so the rate of optimizer 'critic'"):
        optim.build(settings(learning_rate=0.0), normal(0), constant(), groups=groups)


def test_settings_are_all_read_from_the_config():
    cfg = settings(b1=0.5, b2=0.6, eps=0.1)
    optimizer = optim.build(cfg, normal(0), constant())
    assert optimizer.rules.keys() == {"main"}
    got, *_ = run(cfg, normal(0))
    mask = {name: decayed_by_timm(name) for name in SHAPES}
    assert_close(got, run_optax(optax.adamw(0.1, b1=0.5, b2=0.6, eps=0.1, weight_decay=0.3, mask=mask), normal(0)))
    assert {f.name for f in dataclasses.fields(optim.Settings)} | {"freeze"} == set(vars(cfg))
