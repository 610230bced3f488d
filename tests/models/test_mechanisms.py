"""Every mechanism keeps what it declares: by itself, and in every kind of host; what it refuses is one sentence.

Most of this is traced and not run: numbers come from one compiled function for each mechanism. That every family takes
every mechanism, or says in one line why not, is in `test_options.py`; what ready taps do is in `test_taps.py`.
"""

import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

import attn
import models
from attn import Grid, causal, lengths, sliding_window
from attn.core.masks import as_mask
from models.attention.class_attention import ClassAttention
from models.attention.registry import ATTENTION, make_attention, options_of
from models.core.call import Call, Memory
from models.core.stack import Stack
from models.core.summary import summarize
from models.core.watch import Watch
from models.families.halonet.block import Bottleneck, BottleneckOptions
from models.hosts.block import BlockOptions, PreNormBlock

WIDTH, HEADS, BATCH = 8, 2, 2
MAP, PREFIXED, LINE = Grid((4, 4)), Grid((4, 4), 1), Grid((6,))
FITTING = {
    "bilevel_routing": {"regions": 2, "topk": 2},
    "halo": {"block_size": 2, "halo_size": 1},
    "neighborhood": {"window": 3},
    "window": {"window": 2},
    "shifted_window": {"window": 2},
    "grid": {"window": 2},
}
"""Options that fit a map of 4 x 4; the others need none."""
NOT_FITTING = {
    "bilevel_routing": {"regions": 3},
    "bottleneck": {"shape": (3, 4)},
    "halo": {"block_size": 3},
    "neighborhood": {"window": (3, 3, 3)},
    "window": {"window": 3, "padding": False},
    "shifted_window": {"window": (4, 3), "padding": False},
    "grid": {"window": 3, "padding": False},
}
"""Options that do not fit it."""
INSIDE = ("q", "k", "v", "routes", "logits", "probs", "lse", "heads")
"""Sites that a mechanism may have besides `attn.in` and `attn.out`."""
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
mechanisms = pytest.mark.parametrize("name", ATTENTION)


def alone(name, options=None, grid=MAP, **shared):
    """The mechanism by itself, made for a grid as a host makes it; it refuses nothing before it is called."""
    known = {"shape": grid.shape if len(grid.shape) == 2 else MAP.shape} if name == "bottleneck" else {}
    if name == "neighborhood" and len(grid.shape) != 2 and not options:
        known = {"window": (3,) * len(grid.shape)}
    options = known | (FITTING.get(name, {}) if options is None and not known else options or {})
    return make_attention(name, WIDTH, HEADS, shared=shared, options=options, rngs=nnx.Rngs(0))


def abstract(name, options=None, grid=MAP, **shared):
    return nnx.eval_shape(lambda: alone(name, options, grid, **shared))


def tokens(grid, batch=BATCH, width=WIDTH):
    return jax.random.normal(jax.random.key(1), (batch, grid.tokens, width))


def traced(mechanism, call, tap=None, batch=BATCH):
    """Shapes of what a mechanism gives, and what a tap records."""
    graph, params, state = models.split(mechanism)
    watch = None if tap is None else Watch(tap)

    def run(params, x):
        y = models.merge(graph, params, state)(x, call.replace(tap=watch))
        return y, [] if watch is None else [one.arrays for one in watch.finish(1)]

    return jax.eval_shape(run, params, jax.ShapeDtypeStruct((batch, call.grid.tokens, WIDTH), jnp.float32))


def one_line(error):
    """What a refusal says: one sentence (JAX appends a note of its own)."""
    text = str(error.value).partition("\n-----")[0]
    assert "\n" not in text
    assert len(text) < 300
    return text


def refused(call, *arguments, **options):
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    return one_line(error)


# --- in every kind of host --------------------------------------------------------------------------------------------


class Layers(nnx.Module):
    """Two blocks on tokens of a grid, called as a model is."""

    def __init__(self, make, call, scan, dtype):
        self.call, self.dtype = call, dtype
        self.stack = Stack([make], 2, rngs=nnx.Rngs(0), scan=scan)

    def __call__(self, x, *, tap=None):
        watch = None if tap is None else Watch(tap)
        y, _ = self.stack(x if self.dtype is None else x.astype(self.dtype), self.call.replace(tap=watch))
        if watch is not None:
            watch.finish(2)
        return y


def isotropic(name, options, **own):
    own = {"image_size": 16, "patch_size": 4, "width": WIDTH, "depth": 2, "heads": HEADS, "mlp_width": 8} | own
    return models.create("vit_mu16", rngs=nnx.Rngs(0), attention=name, attention_options=options, channels=1, **own)


def hierarchy(name, options, **own):
    """Maps of 8 x 8 and 4 x 4."""
    own = {"image_size": 32, "width": WIDTH, "depths": (2, 1), "heads": (HEADS, HEADS), "mlp_ratio": 1} | own
    return models.create("nat_mini", rngs=nnx.Rngs(0), attention=name, attention_options=options, channels=1, **own)


def bottleneck(name, options, scan=True, dtype=None):
    """Blocks of HaloNet."""
    own = BottleneckOptions(WIDTH, WIDTH, heads=HEADS, attention=name, attention_options=options, grid=MAP, dtype=dtype)
    return Layers(partial(Bottleneck, own), Call(MAP), scan, dtype)


def decoder(name, options, scan=True, dtype=None):
    """Blocks on a sequence in which no token sees a later one."""
    own = BlockOptions(WIDTH, HEADS, 8, attention=name, attention_options=options, grid=LINE, dtype=dtype)
    return Layers(partial(PreNormBlock, own), Call(LINE, mask=causal()), scan, dtype)


HOSTS = {  # build, the grids of its layers, the shape of what it is called with, kinds of masks
    "isotropic with class token": (isotropic, (PREFIXED,), (BATCH, 16, 16, 1), ()),
    "isotropic": (partial(isotropic, class_token=False, pool="avg"), (MAP,), (BATCH, 16, 16, 1), ()),
    "hierarchy": (hierarchy, (Grid((8, 8)), MAP), (BATCH, 32, 32, 1), ()),
    "bottleneck": (bottleneck, (MAP,), (BATCH, 16, WIDTH), ()),
    "decoder": (decoder, (LINE,), (BATCH, 6, WIDTH), ("causal",)),
}


def called(model, shape, tap=None):
    """What a model gives, as shapes."""
    graph, params, state = models.split(model)
    inputs = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda p, s, x: models.merge(graph, p, s)(x, tap=tap), params, state, inputs)


def differentiated(model, shape):
    """Gradients of the parameters of a model, as shapes."""
    graph, params, state = models.split(model)

    def loss(params, state):
        return models.merge(graph, params, state)(jnp.zeros(shape)).sum()

    return jax.eval_shape(jax.grad(loss), params, state)


@pytest.mark.parametrize("host", HOSTS)
@mechanisms
def test_it_fits_a_host_or_the_host_is_not_built(name, host):
    """Forward, gradient, scanned, unrolled, in bfloat16, and its own sites; or what `refuse` says, and nothing more."""
    build, grids, shape, masks = HOSTS[host]
    fitting = {"window": (3,)} if (name, host) == ("neighborhood", "decoder") else FITTING.get(name)
    for number, options in enumerate((fitting, *([NOT_FITTING[name]] if name in NOT_FITTING else []))):
        whole = [abstract(name, options or {}, grid) for grid in grids]
        sentence = next(filter(None, (one.refuse(grid) for one, grid in zip(whole, grids, strict=True))), None)
        if sentence is not None:
            said = refused(nnx.eval_shape, partial(build, name, options))
            assert said == f"attention {name!r} does not fit here: {sentence}"
            continue
        assert number == 0, "what does not fit a map of 4 x 4 is built"
        model = nnx.eval_shape(partial(build, name, options))
        if sentence := whole[0].refuse(grids[0], masks=masks):
            assert refused(called, model, shape) == sentence
            continue
        seen = set()

        @models.tap("attn.in", "attn.out", *INSIDE)
        def look(site, value, seen=seen):
            assert site.path.endswith(".attn")
            seen.add(site.name)
            return value

        y = called(model, shape, look)
        assert seen == {"attn.in", "attn.out", *ATTENTION[name].declaration.sites}
        for own in ({"scan": False}, {"dtype": jnp.bfloat16}) if host in ("isotropic", "decoder") else ():
            assert called(nnx.eval_shape(partial(build, name, options, **own)), shape).shape == y.shape
        assert all(value.dtype == jnp.float32 for value in differentiated(model, shape).values())


# --- by itself: what is declared --------------------------------------------------------------------------------------


@mechanisms
def test_sites(name):
    """Each is there when nothing else is asked for, with a word for every axis; others are no sites of it."""
    declared = ATTENTION[name].declaration.sites
    sizes = {"batch": BATCH, "heads": HEADS * (2 if name == "differential" else 1)}
    for site in INSIDE:
        axes = []

        @models.tap(site)
        def look(where, value, axes=axes):
            axes.append(dict(zip(where.axes, value.shape, strict=True)))
            return value

        if site not in declared:
            assert refused(traced, abstract(name), Call(MAP), look).startswith(f"no site {site!r} was reached")
            continue
        _, (recorded,) = traced(abstract(name), Call(MAP), models.record(site))
        traced(abstract(name), Call(MAP), look)
        (found,) = axes
        (value,) = recorded.values()
        assert value.shape == (1, *found.values())
        assert {word: found[word] for word in sizes if word in found} == {w: n for w, n in sizes.items() if w in found}
        if site in ("logits", "probs"):
            assert value.dtype == jnp.float32


@mechanisms
def test_axes_and_sizes(name):
    """Grids of one, two and three axes, and maps of any size."""
    has = ATTENTION[name].declaration
    for grid in (LINE, MAP, Grid((2, 3, 4))):
        whole = abstract(name, None, grid)
        if len(grid.shape) in has.axes:
            assert whole.refuse(grid) is None
            assert traced(whole, Call(grid))[0].shape == (BATCH, grid.tokens, WIDTH)
        else:
            assert f" or {len(grid.shape)} axes" not in refused(traced, whole, Call(grid))
            assert f"not for one of {grid.shape}" in whole.refuse(grid)
    odd = [Grid((5, 3)), Grid((1, 2))]
    if has.any_size:
        assert all(traced(abstract(name), Call(grid))[0].shape == (BATCH, grid.tokens, WIDTH) for grid in odd)
    else:
        whole = abstract(name)
        assert all(refused(traced, whole, Call(grid)) == whole.refuse(grid) for grid in odd)
    assert (name in NOT_FITTING) or has.any_size


@mechanisms
def test_what_is_not_declared_is_refused(name):
    """Prefix tokens, a memory, and kinds of masks; by the call as by `refuse`, and by nothing that is declared."""
    has, whole = ATTENTION[name].declaration, abstract(name)
    memory = Memory(jnp.zeros((BATCH, 5, WIDTH)))
    assert (whole.refuse(PREFIXED) is None) == has.prefix
    assert (whole.refuse(MAP, memory=True) is None) == has.memory
    calls = {PREFIXED: Call(PREFIXED)} if not has.prefix else {}
    calls |= {"memory": Call(MAP, memory=memory)} if not has.memory else {}
    for kind, mask in masks_of(MAP.tokens, BATCH).items():
        assert mask.kinds == (kind,)
        assert (whole.refuse(MAP, masks=(kind,)) is None) == (kind in has.masks)
        calls |= {kind: Call(MAP, mask=mask)} if kind not in has.masks else {}
    for call in calls.values():
        kinds = () if call.mask is None else call.mask.kinds
        sentence = whole.refuse(call.grid, memory=call.memory is not None, masks=kinds)
        assert refused(traced, whole, call) == sentence


@mechanisms
def test_what_it_gives(name):
    """Tokens as it is given; or heads side by side, of as many channels as are asked for, and with a stride fewer."""
    if ATTENTION[name].declaration.shape == "tokens":
        assert not {"width_out", "stride"} & set(options_of(name)) or name in ("neighborhood", "outlook")
        return
    options = FITTING.get(name, {}) | {"width_out": 12, "stride": 2}
    assert traced(abstract(name, options), Call(MAP))[0].shape == (BATCH, 4, 12)
    assert not [one for one in models.split(abstract(name))[1] if "proj" in one]


@mechanisms
def test_what_the_declaration_says(name):
    entry = ATTENTION[name]
    has = entry.declaration
    assert entry.name == name
    assert has.summary
    assert "\n" not in has.summary
    assert re.fullmatch(r"(arXiv:\d{4}\.\d{5}(, )?)*", has.paper)
    assert not has.operator or callable(getattr(attn, has.operator))
    assert set(has.sites) <= set(models.SITES)
    assert set(has.masks) <= set(masks_of(1, 1))
    # Of a class with several names all but the words are the same.
    made = entry.build(WIDTH, HEADS, **entry.for_grid(MAP), rngs=nnx.Rngs(0)).declaration
    assert dataclasses.replace(made, summary=has.summary, paper=has.paper) == has


# --- by itself: what it costs -----------------------------------------------------------------------------------------


class Alone(nnx.Module):
    """A mechanism as a model."""

    def __init__(self, mechanism, grid):
        self.attn, self.grid = mechanism, grid

    def inputs(self, batch):
        return (jax.ShapeDtypeStruct((batch, self.grid.tokens, WIDTH), jnp.float32),)

    def __call__(self, x):
        return self.attn(x, Call(self.grid))


VARIED = {
    "bilevel_routing": (
        {"regions": 2, "topk": 3, "padding": "input", "qk_width": 4},
        {"regions": 2, "topk": 2, "padding": "projected", "local": 3},
        {"regions": 2, "topk": 1, "projection": False, "local": 0, "padding": "input"},
    ),
    "bottleneck": ({"width_out": 12, "qk_ratio": 0.5, "stride": 2},),
    "convolution": ({"size": 3},),
    "dense": ({"qk_norm": True, "scale_norm": True},),
    "halo": (
        {"block_size": 2, "halo_size": 1, "stride": 2},
        {"block_size": 3, "halo_size": 2, "padding": True, "width_out": 12, "head_width": 2},
        {"block_size": 3, "halo_size": 1, "stride": 2, "padding": True},
    ),
    "local_dense": ({"local": 3, "local_of": "values"}, {"local": 0}),
    "neighborhood": ({"window": 5}, {"window": 3, "dilation": 2}, {"window": (2, 3), "stride": (2, 1)}),
    "outlook": ({"window": 5, "stride": 1},),
    "window": ({"window": (3, 4), "head_width": 6},),
    "shifted_window": ({"window": 3},),
    "grid": ({"window": (2, 3)},),
}
"""Options that a cost depends on."""


def counted(mechanism, grid):
    return summarize(Alone(mechanism, grid), 1, activations=False).total.multiply_adds


@mechanisms
def test_its_cost_is_what_it_multiplies(name):
    checked = 0
    for grid in (MAP, PREFIXED, LINE, Grid((5, 6)), Grid((2, 3, 4), 2)):
        for options in (None, *(VARIED.get(name, ()) if len(grid.shape) == 2 else ())):
            whole = abstract(name, options, grid)
            if whole.refuse(grid) is None:
                checked += 1
                assert whole.cost(grid) == counted(whole, grid), (grid, options)
    assert checked >= 1 + len(VARIED.get(name, ()))


def test_class_attention_costs_what_it_multiplies():
    whole = nnx.eval_shape(lambda: ClassAttention(WIDTH, HEADS, rngs=nnx.Rngs(0)))
    assert whole.cost(PREFIXED) == counted(whole, PREFIXED)


def by_formula(text, **values):
    """A formula as it is written: `"4 N C^2 + 2 N w^2 C"`."""
    factors = re.sub(r"(?<=[\w)]) +(?=[\w(])", " * ", text.replace("^", "**"))
    return eval(factors, {}, values)


@mechanisms
def test_the_formula_of_its_cost(name):
    """For the options that it has by itself, on a map that needs no padding."""
    text, *_ = ATTENTION[name].declaration.cost.partition(" for ")
    options = FITTING.get(name, {})
    whole = abstract(name)
    window = options.get("window", getattr(whole, "window", 0))
    if name == "halo":
        window = options["block_size"] + 2 * options["halo_size"]
    sizes = {"N": MAP.places, "C": WIDTH, "H": HEADS, "w": window, "s": getattr(whole, "stride", 1), "k": 2, "R": 4}
    assert whole.cost(MAP) == by_formula(text, **sizes, Y=MAP.shape[0], X=MAP.shape[1])


# --- by itself: numbers -----------------------------------------------------------------------------------------------


def masks_of(count, batch):
    """One of each kind."""
    pairs = np.eye(count, dtype=bool) | (np.random.default_rng(0).random((count, count)) < 0.6)
    return {
        "boolean": as_mask(jnp.asarray(pairs)),
        "lengths": lengths(jnp.full(batch, max(1, count - 5))),
        "causal": causal(),
        "window": sliding_window(3),
    }


@functools.cache
def numbers(name):
    """What one compiled function gives: a stack and its unrolled twin, and the mechanism by itself.

    `"plain"`, `"boolean"` and so on say how far each token (rows) is moved by another one (columns), without and with a
    mask.
    """
    has = ATTENTION[name].declaration
    grid = PREFIXED if has.prefix else MAP
    own = BlockOptions(WIDTH, HEADS, 8, attention=name, attention_options=FITTING.get(name), grid=grid)
    twins = []
    for scan in (True, False):
        graph, like, state = models.split(
            nnx.eval_shape(lambda scan=scan: Layers(partial(PreNormBlock, own), Call(grid), scan, None))
        )
        twins.append((graph, tiny_models.numbers(like), state))
    graph, like, _ = models.split(abstract(name, None, grid))
    count = grid.tokens
    x = tokens(grid, 1)
    moved = jnp.concatenate([x, x + jnp.eye(count)[:, :, None] * tokens(grid, 1, 1)[0, 0] * 3 + 0], 0)
    memory = jax.random.normal(jax.random.key(2), (BATCH, 7, WIDTH))

    @partial(jax.jit, compiler_options=QUICK_COMPILE)
    def run(params, of_twins):
        found = {}

        def look(graph, params, state, tap):
            return models.merge(graph, params, state)(tokens(grid), tap=tap)

        for kind, (own_graph, _, own_state), given in zip(("scanned", "unrolled"), twins, of_twins, strict=True):
            tap = models.record(*has.sites) if has.sites else None
            watch = None if tap is None else Watch(tap)
            model = models.merge(own_graph, given, own_state)
            y, _ = model.stack(tokens(grid), Call(grid, tap=watch))
            recorded = [] if watch is None else watch.finish(2)

            def loss(given, own_graph=own_graph, own_state=own_state):
                y = look(own_graph, given, own_state, None)
                return jnp.sin(y).sum(), y

            gradients, plain = jax.grad(loss, has_aux=True)(given)
            found[kind] = {"looked": y, "plain": plain, "gradients": models.unstack(gradients)}
            found[kind]["recorded"] = recorded[0].arrays if recorded else {}

        mechanism = models.merge(graph, params, {})

        def influence(**own):
            y = mechanism(moved, Call(grid, **own))
            return jnp.abs(y[1:] - y[:1]).max(-1).T if y.shape[1] == count else y

        found["plain"] = influence()
        for kind, mask in masks_of(count, count + 1).items():
            if kind in has.masks:
                found[kind] = influence(mask=mask)
        if has.memory:
            y = tokens(grid)
            found["of itself"] = [mechanism(y, Call(grid)), mechanism(y, Call(grid, memory=Memory(y)))]
            allowed = lengths(jnp.full(BATCH, 4))
            found["of others"] = [
                mechanism(y, Call(grid, memory=Memory(memory))),
                mechanism(y, Call(grid, memory=Memory(memory[:, :4]))),
                mechanism(y, Call(grid, memory=Memory(memory), mask=allowed)),
            ]
        return found

    return jax.device_get(run(tiny_models.numbers(like), [given for _, given, _ in twins]))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(np.abs(b).max(initial=0))))


@mechanisms
def test_scanned_equals_unrolled(name):
    """With and without taps, outputs, gradients of every parameter, and what is recorded."""
    scanned, unrolled = (numbers(name)[kind] for kind in ("scanned", "unrolled"))
    for twin in (scanned, unrolled):
        close(twin["looked"], twin["plain"])
    jax.tree.map(close, scanned, unrolled)
    assert all(np.isfinite(value).all() for value in jax.tree.leaves(scanned))
    unused = [name for name, value in scanned["gradients"].items() if not np.abs(value).max() > 0]
    assert not unused


@mechanisms
def test_probabilities_are_those_of_the_logits(name):
    """Of every query; and the logsumexp is that of the logits."""
    found = {full.rpartition(".")[2]: value for full, value in numbers(name)["scanned"]["recorded"].items()}
    assert set(found) == set(ATTENTION[name].declaration.sites)
    if "probs" not in found:
        return
    close(found["probs"].sum(-1), np.ones(()), 1e-5)
    total = np.log(np.exp(found["logits"].astype(np.float64)).sum(-1, keepdims=True))
    close(found["probs"], np.exp(found["logits"] - total))
    assert sorted(np.round(found["lse"].ravel(), 3)) == pytest.approx(sorted(np.round(total.ravel(), 3)), abs=2e-3)


@mechanisms
def test_prefix_tokens_see_and_are_seen(name):
    if not ATTENTION[name].declaration.prefix:
        return
    heard = numbers(name)["plain"] > 1e-6
    if name == "identity":
        np.testing.assert_array_equal(heard, np.eye(len(heard), dtype=bool))
    else:
        assert heard[0].all()
        assert heard[:, 0].all()


@mechanisms
def test_a_mask_leaves_what_is_allowed(name):
    """A token hears another one if it did without a mask, and the mask allows it."""
    found = numbers(name)
    count = len(found["plain"])
    off = ~np.eye(count, dtype=bool)
    for kind, mask in masks_of(count, 1).items():
        if kind in ATTENTION[name].declaration.masks:
            allowed = np.broadcast_to(mask.dense(1, 1, count, count)[0, 0], (count, count))
            assert not allowed.all()
            np.testing.assert_array_equal((found[kind] > 1e-6)[off], ((found["plain"] > 1e-6) & allowed)[off], kind)


@mechanisms
def test_a_memory_is_attended_to(name):
    """As the tokens themselves, with a mask over its tokens, and through a projection of its own where it is wider."""
    if not ATTENTION[name].declaration.memory:
        return
    found = numbers(name)
    close(*found["of itself"])
    whole, part, masked = found["of others"]
    close(masked, part)
    hears = np.abs(whole - part).max() > 1e-4
    assert hears == (name != "identity")
    wide = Call(MAP, memory=Memory(jnp.zeros((BATCH, 5, 12))))
    if "memory_width" in options_of(name):
        assert traced(abstract(name, {"memory_width": 12}), wide)[0].shape == (BATCH, 16, WIDTH)
        assert "give it the option memory_width=12" in refused(traced, abstract(name), wide)
    elif hears:
        assert "memory_width" not in refused(traced, abstract(name), wide)
