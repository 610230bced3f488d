"""The choice of implementation: made for the platform that is lowered for, explained as it is made, never silent."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton
from lowering import device, lowered

from attn import explain, fallback
from attn.core.operator import Implementation, Operator, dispatch

pytestmark = pytest.mark.smoke


def stand_in(params, limit):
    """A kernel that doubles, of at most `limit` rows."""

    def double(source, target):
        target[...] = source[...] * 2

    def forward(x, *, factor):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(double, out_shape=like, compiler_params=params)(x) * factor

    def refuse(x, *, wide):
        return f"more than {limit} rows" if x.shape[0] > limit else None

    return types.SimpleNamespace(forward=forward, refuse=refuse)


@pytest.fixture
def operator(monkeypatch):
    modules = {
        "tpu": stand_in(pltpu.CompilerParams(), 16),
        "gpu": stand_in(pltriton.CompilerParams(), 32),
        "xla": types.SimpleNamespace(
            forward=lambda x, *, factor: jnp.tanh(x) * factor, refuse=lambda x, *, wide: None
        ),
        "slow": types.SimpleNamespace(forward=lambda x, *, factor: x * factor, refuse=lambda x, *, wide: None),
    }
    modules["gpu"].unprofitable = lambda x, *, wide: "faster without" if wide else None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"stand_ins.{name}", module)
    return Operator(
        "doubling",
        (
            Implementation("tpu", "stand_ins.tpu", ("tpu",)),
            Implementation("gpu", "stand_ins.gpu", ("cuda",)),
            Implementation("xla", "stand_ins.xla"),
            Implementation("slow", "stand_ins.slow"),
        ),
    )


MARKS = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton", "xla": "stablehlo.tanh"}
CASES = {  # rows, wide -> what runs on cpu, tpu, cuda
    (8, False): ("xla", "tpu", "gpu"),
    (32, False): ("xla", "xla", "gpu"),
    (64, False): ("xla", "xla", "xla"),
    (8, True): ("xla", "tpu", "xla"),
}


def doubled(operator, forced=None, wide=False):
    def run(x):
        options, settings = {"wide": wide}, {"factor": 3.0}
        return dispatch(operator, "forward", (x,), options=options, settings=settings, about="here", forced=forced)

    return run


@pytest.mark.parametrize(("case", "expected"), CASES.items())
def test_what_is_explained_is_what_is_lowered(operator, case, expected):
    rows, wide = case
    x = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
    explained = explain(doubled(operator, wide=wide), x)
    for platform, name in zip(("cpu", "tpu", "cuda"), expected, strict=True):
        choice = explained[platform]
        assert choice.implementation == name
        assert {choice.implementation, *choice.refused} == {"tpu", "gpu", "xla", "slow"}
        text = lowered(doubled(operator, wide=wide), platform, x)
        assert [mark for mark in MARKS if MARKS[mark] in text] == [name], platform


def test_an_explanation_is_a_table_with_reasons(operator):
    shown = str(explain(doubled(operator), jnp.ones((32, 128))))
    assert shown.splitlines() == [
        "doubling  float32[32,128] here",
        "  cpu   xla",
        "        not tpu: runs on tpu only",
        "        not gpu: runs on cuda only",
        "        not slow: xla comes first",
        "  tpu   xla (fallback from tpu)",
        "        not tpu: more than 16 rows",
        "        not gpu: runs on cuda only",
        "        not slow: xla comes first",
        "  cuda  gpu",
        "        not tpu: runs on tpu only",
        "        not xla: gpu comes first",
        "        not slow: gpu comes first",
    ]


def test_a_whole_computation_is_explained_and_each_kind_of_call_once(operator):
    def model(x, rows, *, double):
        run = jax.jit(double)
        return run(x) + run(x) + run(x[:rows]).sum()

    double = doubled(operator)
    for _ in range(2):  # what jit remembers of the first time hides nothing from the second
        calls = explain(model, jax.ShapeDtypeStruct((32, 128), jnp.float32), 8, double=double).calls
        assert [call.choices["tpu"].implementation for call in calls] == ["xla", "tpu"]
    with pytest.raises(ValueError, match="2 kinds of calls"):
        explain(model, jnp.ones((32, 128)), 8, double=double)["tpu"]
    assert str(explain(jnp.sin, 1.0)) == "no operator with a choice of implementations"


def test_a_fallback_is_an_error_where_it_would_run_and_nowhere_else(operator):
    x = jnp.ones((32, 128))
    run = jax.jit(doubled(operator))
    np.testing.assert_array_equal(run(x), 3 * jnp.tanh(x))
    with fallback("error"):
        np.testing.assert_array_equal(run(x), 3 * jnp.tanh(x))
        with device("cuda"):
            traced = run.trace(x)
            assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
        with pytest.raises(ValueError, match=r"doubling on tpu: 'tpu' refuses float32\[32,128\] here \(more than 16"):
            traced.lower(lowering_platforms=("tpu",))
        with fallback("allow"):
            assert "tanh" in run.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    # What jit remembers of the other setting is not used.
    assert "tanh" in run.trace(x).lower(lowering_platforms=("tpu",)).as_text()


def test_what_is_not_worth_it_is_no_fallback(operator):
    with fallback("error"):
        assert "tanh" in lowered(doubled(operator, wide=True), "cuda", jnp.ones((64, 128)))


def test_the_environment_sets_what_no_context_does(operator, monkeypatch):
    x = jnp.ones((32, 128))
    monkeypatch.setenv("FOVEA_FALLBACK", "error")
    with pytest.raises(ValueError, match="more than 16 rows"):
        lowered(doubled(operator), "tpu", x)
    with fallback("allow"):
        assert "tanh" in lowered(doubled(operator), "tpu", x)
    monkeypatch.setenv("FOVEA_FALLBACK", "eror")
    with pytest.raises(ValueError, match="FOVEA_FALLBACK: unknown policy 'eror'; allowed: allow, error"):
        lowered(doubled(operator), "tpu", x)
    with pytest.raises(ValueError, match="fallback: unknown policy"), fallback("never"):
        pass


def test_a_forced_implementation_runs_or_says_why_not(operator):
    x = jnp.ones((32, 128))
    np.testing.assert_array_equal(jax.jit(doubled(operator, "slow"))(x), 3 * x)
    assert "tpu_custom_call" in lowered(doubled(operator, "tpu"), "tpu", x[:8])
    assert "triton" in lowered(doubled(operator, "gpu", wide=True), "cuda", x)
    with pytest.raises(ValueError, match="implementation='tpu' of doubling: more than 16 rows"):
        jax.jit(doubled(operator, "tpu"))(x)
    with pytest.raises(ValueError, match="implementation='tpu' of doubling runs on tpu only, and this program"):
        jax.jit(doubled(operator, "tpu"))(x[:8])
    with pytest.raises(ValueError, match="unknown implementation 'tup' of doubling; nearest: tpu; allowed: tpu, gpu"):
        doubled(operator, "tup")(x)


def test_an_axis_of_unknown_size_takes_no_kernel(operator):
    (rows,) = jax.export.symbolic_shape("rows")
    explained = explain(doubled(operator), jax.ShapeDtypeStruct((rows, 128), jnp.float32))
    assert explained["tpu"].implementation == explained["cuda"].implementation == "xla"
    assert "size of every axis" in explained["tpu"].refused["tpu"]


def test_no_implementation_at_all_is_an_error(operator):
    kernels = Operator("doubling", operator.implementations[:2])
    with pytest.raises(ValueError, match="no implementation of doubling for cpu: tpu: runs on tpu only; gpu: runs on"):
        kernels.choose("cpu", (jnp.ones((8, 128)),), wide=False)
