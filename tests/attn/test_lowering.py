"""One equation for a step of an operator: traced, differentiated, mapped, rematerialized, lowered, run by itself."""

import dataclasses
import re
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.experimental.custom_partitioning import custom_partitioning
from jaxprs import steps, traced

from attn import explain
from attn.core.lowering import expanded, stopping
from attn.core.operator import Implementation, Operator

pytestmark = pytest.mark.smoke

HEADS = ("batch", None, "heads", None)


@dataclasses.dataclass(frozen=True)
class Settings:
    scale: float = 2.0
    about = ""


def weigh(x, y, table, *, scale):
    """Every example and head by itself; heads of y may be fewer, and the table is of heads alone."""
    weights = jnp.repeat(y.sum(1, keepdims=True), x.shape[2] // y.shape[2], axis=2)
    weights = weights if table is None else weights * table[:, None]
    return scale * jnp.sin(x) * weights, (x**2).sum(-1)


def module(counts):
    """An implementation that counts how often it is traced."""

    def forward(*inputs, **settings):
        counts.append("forward")
        return weigh(*inputs, **settings)

    def backward(x, y, table, out, size, d_out, d_size, **settings):
        counts.append("backward")
        _, pull = jax.vjp(partial(weigh, **settings), x, y, table)
        return pull((d_out, jnp.zeros_like(size) if d_size is None else d_size))

    return types.SimpleNamespace(forward=forward, backward=backward)


@pytest.fixture
def counts():
    return []


@pytest.fixture
def operator(monkeypatch, counts):
    monkeypatch.setitem(sys.modules, "stand_ins.fused", module(counts))
    monkeypatch.setitem(sys.modules, "stand_ins.plain", module([]))
    return Operator(
        "weighing",
        (Implementation("fused", "stand_ins.fused"), Implementation("plain", "stand_ins.plain", plain=True)),
        layouts=lambda settings, x, y, table: (
            [HEADS, HEADS, None if table is None else ("heads",)],
            [HEADS, HEADS[:-1]],
        ),
        results=lambda settings, x, y, table: (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(x.shape[:-1], x.dtype),
        ),
    )


def run(operator, x, y, table=None, *, returned=2, **options):
    found = operator.run((x, y, table), Settings(), plain=weigh, returned=returned, **options)
    return found if returned > 1 else found[0]


def arrays(*more, seed=0):
    """x, y with half of the heads, and the table; `more` axes come first."""
    rng = np.random.default_rng(seed)
    shapes = ((2, 3, 4, 5), (2, 6, 2, 5), (4,))
    return [jnp.asarray(rng.normal(size=(*more, *shape)), jnp.float32) for shape in shapes]


def total(function):
    def loss(*inputs):
        parts = jax.tree.leaves(function(*inputs))
        return sum(jnp.sum(jnp.cos(part) * (1 + number)) for number, part in enumerate(parts))

    return loss


def close(found, expected, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


plain = partial(weigh, scale=2.0)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("returned", "tables"), [(1, 0), (2, 1)])
def test_values_and_gradients_with_and_without_jit(operator, returned, tables):
    """A result that is not asked for has no cotangent, an array that is not there no gradient."""
    inputs = arrays()[: 2 + tables]

    def expected(*inputs):
        return plain(*inputs, *[None] * (1 - tables))[:returned]

    fused = partial(run, operator, returned=returned)
    argnums = tuple(range(2 + tables))
    wanted = jax.jit(jax.value_and_grad(total(expected), argnums))(*inputs)
    close(jax.value_and_grad(total(fused), argnums)(*inputs), wanted)
    close(jax.jit(jax.value_and_grad(total(fused), argnums))(*inputs), wanted)
    assert steps(jax.grad(total(fused), argnums), *inputs) == ["forward", "backward"]


def test_called_without_jit_it_is_compiled_once(operator, counts):
    for seed in range(3):
        inputs = arrays(seed=seed)
        close(run(operator, *inputs), plain(*inputs))
    assert counts == ["forward"]


def test_equations_of_one_kind_are_one_function_of_the_program(operator, counts):
    def several(x, y, table):
        for _ in range(3):
            x, _ = run(operator, x, y, table)
        return run(operator, x, y)[0]

    text = jax.jit(several).lower(*arrays()).as_text()
    assert len(re.findall(r"func\.func private @attention_step", text)) == 2  # with a table, and without
    assert len(re.findall(r"call @attention_step", text)) == 4
    assert counts == ["forward"] * 2


def test_a_program_for_any_batch_and_two_platforms(operator):
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct(x.shape if x.ndim == 1 else (batch, *x.shape[1:]), x.dtype) for x in arrays()]
    both = jax.value_and_grad(total(partial(run, operator)), (0, 1, 2))
    exported = jax.export.export(jax.jit(both), platforms=("cpu", "tpu"))(*shapes)
    for size in (2, 5):
        inputs = [x if x.ndim == 1 else jnp.resize(x, (size, *x.shape[1:])) for x in arrays()]
        close(exported.call(*inputs), jax.jit(jax.value_and_grad(total(plain), (0, 1, 2)))(*inputs))


def test_what_an_equation_computes_can_be_written_out(operator):
    equation = next(e for e in traced(partial(run, operator), *arrays()) if e.primitive.name == "attention_step")
    operator = equation.params["call"].operator
    assert operator.definition == "reference"
    close(expanded(equation.params, *arrays()), plain(*arrays()))


# --- jax.vmap ---------------------------------------------------------------------------------------------------------

AXES = [(0, 0, 0), (0, 0, None), (0, None, None), (None, 0, None), (None, None, 0), (2, 1, None), (-1, None, 0)]


@pytest.mark.parametrize("axes", AXES)
def test_vmap_is_a_loop_and_one_step(operator, axes):
    """The mapped axis joins the batch, or the heads where a table is mapped or has a gradient."""
    inputs = [x[0] if n is None else jnp.moveaxis(x, 0, n) for x, n in zip(arrays(3), axes, strict=True)]

    def both(function):
        return jax.vmap(lambda *one: (function(*one), jax.grad(total(function), (0, 1, 2))(*one)), axes)

    close(*jax.jit(lambda *inputs: (both(partial(run, operator))(*inputs), both(plain)(*inputs)))(*inputs))
    assert steps(both(partial(run, operator)), *inputs) == ["forward", "forward", "backward"]


def test_vmap_of_vmap_and_results_on_another_axis(operator):
    x, y, table = arrays(3, 2)

    def twice(function):
        return jax.vmap(jax.vmap(function, in_axes=(0, 0, None), out_axes=1), in_axes=(1, 1, 0), out_axes=2)

    close(*jax.jit(lambda *inputs: (twice(partial(run, operator))(*inputs), twice(plain)(*inputs)))(x, y, table[0]))


def test_a_mapped_call_is_explained_as_it_is_run(operator):
    calls = explain(jax.vmap(partial(run, operator), in_axes=(0, 0, None)), *arrays(3)[:2], arrays()[2]).calls
    assert [call.inputs.split()[0] for call in calls] == ["float32[2,3,4,5]", "float32[6,3,4,5]"]


# --- jax.checkpoint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "forward"), [(("attention_heads", "attention_lse"), 1), (("attention_heads",), 2), ((), 2)]
)
@pytest.mark.parametrize("implementation", [None, "plain"])
def test_a_policy_keeps_results_by_name(operator, kept, forward, implementation):
    x, y, table = arrays()

    def loss(x):
        policy = checkpoint_policies.save_only_these_names(*kept)
        layer = jax.checkpoint(partial(run, operator, implementation=implementation), policy=policy)
        return total(lambda x: layer(jnp.tanh(x), y, table))(x)

    expected = jax.grad(total(lambda x: plain(jnp.tanh(x), y, table)))
    close(*jax.jit(lambda x: (jax.grad(loss)(x), expected(x)))(x))
    if implementation is None:
        found = steps(jax.grad(loss), x)
        assert (found.count("forward"), found.count("backward")) == (forward, 1)
    else:
        names = [e.params["name"] for e in traced(jax.grad(loss), x) if e.primitive.name == "name"]
        assert {"attention_heads", "attention_lse"} <= set(names)


# --- what it does not have --------------------------------------------------------------------------------------------

SENTENCE = "^weighing is differentiable in reverse mode, once; implementation='reference' has forward mode and deriv"


def others(function):
    """Derivatives that a step does not have, with and without `jit`."""
    x, y, table = arrays()

    def loss(by):
        return total(function)(x * by, y, table)

    one = jnp.float32(1.0)
    yield "jvp", lambda: jax.jvp(loss, (one,), (one,))
    yield "jvp, compiled", lambda: jax.jit(lambda by: jax.jvp(loss, (by,), (by,)))(one)
    yield "jacfwd", lambda: jax.jacfwd(loss)(one)
    yield "jvp of a mapped one", lambda: jax.jvp(jax.vmap(loss), (one[None],), (one[None],))
    yield "jacfwd of grad", lambda: jax.jacfwd(jax.grad(loss))(one)
    yield "grad of grad", lambda: jax.grad(jax.grad(loss))(one)
    yield "grad of grad, compiled", lambda: jax.jit(jax.grad(jax.grad(loss)))(one)
    yield "grad of jvp", lambda: jax.grad(lambda by: jax.jvp(loss, (by,), (by,))[1])(one)
    yield "hessian", lambda: jax.hessian(loss)(one)


def test_other_derivatives_are_one_sentence(operator):
    for what, derivative in others(partial(run, operator)):
        with pytest.raises(ValueError, match=SENTENCE) as error:
            derivative()
        assert "\n" not in str(error.value), what


def test_a_primal_without_a_tangent_is_no_derivative(operator):
    """Forward mode past the operator, which nothing that is differentiated goes through."""
    x, y, table = arrays()
    _, tangent = jax.jvp(lambda by: by * run(operator, x, y, table)[0].sum(), (1.0,), (1.0,))
    close(tangent, plain(x, y, table)[0].sum())


# --- what may not be lowered ------------------------------------------------------------------------------------------


def test_a_stop_is_of_its_platforms_and_passes_everything_through():
    stops = {"tpu": "not here", "": "nor elsewhere", "cpu": None}
    mapped = jax.vmap(jax.grad(lambda x: jnp.sin(stopping(x, stops))))
    x = jnp.arange(3.0)
    close(mapped(x), jnp.cos(x))
    close(jax.jvp(lambda x: stopping(x, stops) ** 2, (x,), (x,))[1], 2 * x * x)
    for platform, message in (("tpu", "not here"), ("cuda", "nor elsewhere")):
        with pytest.raises(ValueError, match=message):
            jax.jit(mapped).trace(x).lower(lowering_platforms=(platform,))
    assert stopping(x, {"tpu": None}) is x


def test_what_the_compiler_would_cut_is_not_cut_on_one_device(operator, monkeypatch):
    """JAX's calls of cuDNN are `custom_partitioning`, which asks for the device that a program is lowered for."""
    cut = custom_partitioning(lambda x: 2 * jnp.sin(x))
    cut.def_partition(
        partition=lambda *_: pytest.fail("it is cut"), infer_sharding_from_operands=None, sharding_rule="... -> ..."
    )
    fused = types.SimpleNamespace(forward=lambda x, *_, scale: (cut(x), (x**2).sum(-1)), backward=None)
    monkeypatch.setitem(sys.modules, "stand_ins.fused", fused)
    x, y, _ = arrays()
    close(run(operator, x, y, returned=1), 2 * jnp.sin(x))
    close(jax.jit(lambda x, y: run(operator, x, y, returned=1))(x, y), 2 * jnp.sin(x))
    many = jax.sharding.AbstractMesh((2,), ("data",))
    shared = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(many, jax.P("data")))
    with pytest.raises(ValueError, match="weighing is lowered for 2 devices without their mesh"):
        jax.jit(lambda x: run(operator, x, y, returned=1)).trace(shared).lower(lowering_platforms=("cpu",))
