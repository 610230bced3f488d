"""The choice of implementation: made for the platform that is lowered for, explained as it is made, never silent."""

import dataclasses
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

import attn
from attn import explain, fallback
from attn.core.operator import Implementation, Operator
from kernels.neighborhood import gpu, tpu

pytestmark = pytest.mark.smoke


@dataclasses.dataclass(frozen=True)
class Settings:
    wide: bool = False
    factor: float = 3.0
    about = "here"


def stand_in(params, limit):
    """A kernel that doubles, of at most `limit` rows."""

    def double(source, target):
        target[...] = source[...] * 2

    def forward(x, *, wide, factor):
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (pl.pallas_call(double, out_shape=like, compiler_params=params)(x) * factor,)

    def refuse(x, *, wide):
        return f"more than {limit} rows" if x.shape[0] > limit else None

    return types.SimpleNamespace(forward=forward, refuse=refuse)


def written(x, *, wide, factor):
    return (x * factor,)


@pytest.fixture
def operator(monkeypatch):
    modules = {
        "tpu": stand_in(pltpu.CompilerParams(), 16),
        "gpu": stand_in(pltriton.CompilerParams(), 32),
        "xla": types.SimpleNamespace(forward=lambda x, *, wide, factor: (jnp.tanh(x) * factor,)),
        "slow": types.SimpleNamespace(forward=written),
    }
    modules["gpu"].unprofitable = lambda x, *, wide: "faster without" if wide else None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"stand_ins.{name}", module)
    return Operator(
        "doubling",
        (
            Implementation("tpu", "stand_ins.tpu", ("tpu",)),
            Implementation("gpu", "stand_ins.gpu", ("cuda",)),
            Implementation("xla", "stand_ins.xla", takes=("noise",)),
            Implementation("slow", "stand_ins.slow", plain=True),
        ),
        layouts=lambda settings, x: ([("batch", None)], [("batch", None)]),
        results=lambda settings, x: (jax.ShapeDtypeStruct(x.shape, x.dtype),),
        decisive=("wide",),
        keeps_results=False,
    )


MARKS = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton", "xla": "stablehlo.tanh"}
CASES = {  # rows, wide -> what runs on cpu, tpu, cuda
    (8, False): ("xla", "tpu", "gpu"),
    (32, False): ("xla", "xla", "gpu"),
    (64, False): ("xla", "xla", "xla"),
    (8, True): ("xla", "tpu", "xla"),
}


def doubled(operator, forced=None, wide=False, asked=()):
    def run(x):
        return operator.run((x,), Settings(wide), plain=written, asked=asked, implementation=forced)[0]

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
    np.testing.assert_array_equal(doubled(operator, "reference")(x), 3 * x)


def test_an_axis_of_unknown_size_takes_no_kernel(operator):
    (rows,) = jax.export.symbolic_shape("rows")
    explained = explain(doubled(operator), jax.ShapeDtypeStruct((rows, 128), jnp.float32))
    assert explained["tpu"].implementation == explained["cuda"].implementation == "xla"
    assert "size of every axis" in explained["tpu"].refused["tpu"]


def test_no_implementation_at_all_is_an_error(operator):
    kernels = dataclasses.replace(operator, implementations=operator.implementations[:2])
    with pytest.raises(ValueError, match="no implementation of doubling for cpu: tpu: runs on tpu only; gpu: runs on"):
        kernels.choose("cpu", (jnp.ones((8, 128)),), Settings())


def test_what_goes_with_a_call_is_taken_or_refused_by_name(operator):
    x = jnp.ones((8, 128))
    with_noise, with_both = (doubled(operator, asked=asked) for asked in (("noise",), ("noise", "mask")))
    explained = explain(with_noise, x)
    assert {explained[platform].implementation for platform in ("cpu", "tpu", "cuda")} == {"xla"}
    assert [explained[platform].fallback_from for platform in ("cpu", "tpu", "cuda")] == [None, "tpu", "gpu"]
    assert explained["tpu"].refused["tpu"] == "has no noise"
    explained = explain(with_both, x)
    assert {explained[platform].implementation for platform in ("cpu", "tpu", "cuda")} == {"slow"}
    assert explained["tpu"].refused["tpu"] == "has no noise and no mask"
    assert explained["cpu"].refused["xla"] == "has no mask"
    assert explained.calls[0].inputs == "float32[8,128] here with noise, mask"
    with fallback("error"):
        lowered(with_noise, "cpu", x)
        with pytest.raises(ValueError, match=r"doubling on tpu: 'tpu' refuses .* here with noise \(has no noise\)"):
            lowered(with_noise, "tpu", x)
        with pytest.raises(ValueError, match=r"doubling on cpu: 'xla' refuses .* \(has no mask\)"):
            lowered(with_both, "cpu", x)
    doubled(operator, "xla", asked=("noise",))(x)
    for forced, asked, reason in (("tpu", ("noise",), "has no noise"), ("xla", ("mask", "noise"), "has no mask")):
        with pytest.raises(ValueError, match=f"implementation='{forced}' of doubling: {reason}"):
            doubled(operator, forced, asked=asked)(x)
    of_tpus = dataclasses.replace(operator.implementations[-1], platforms=("tpu",))
    run = doubled(dataclasses.replace(operator, implementations=(of_tpus,)), "slow", asked=("mask",))
    with pytest.raises(ValueError, match="implementation='slow' of doubling runs on tpu only"):
        lowered(run, "cpu", x)


@pytest.mark.parametrize("keeps_maps", [False, True])
def test_what_a_machine_lacks_is_found_when_it_lowers(operator, keeps_maps):
    """The trace is the same on all machines, and so can be lowered on another."""
    _, gpu, _, slow = operator.implementations
    operator = dataclasses.replace(operator, keeps_maps=keeps_maps, implementations=(gpu, slow))
    x = jnp.ones((32, 128))
    traces = []
    for said in (None, "no such compiler here"):
        gpu.load().unavailable = lambda said=said: said
        traces.append(str(jax.make_jaxpr(doubled(operator))(x)))
        choice = explain(doubled(operator), x)["cuda"]
        assert (choice.implementation, choice.fallback_from) == (("slow", "gpu") if said else ("gpu", None))
        assert ("triton" in lowered(doubled(operator), "cuda", x)) == (said is None)
    assert choice.refused["gpu"] == "no such compiler here"
    assert "attention_step" in traces[0]
    assert traces[0] == traces[1]


# --- what a choice costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [attn.neighborhood_attention, attn.window_attention])
def test_tiles_are_chosen_only_for_a_platform_that_is_lowered_for(monkeypatch, attend):
    """To trace, and to lower for a CPU, asks no kernel how it would cut a map; to lower for a TPU asks that one."""
    asked = []
    for kernel in (tpu, gpu):
        honest = kernel.choose
        monkeypatch.setattr(
            kernel, "choose", lambda *a, k=kernel, f=honest, **o: (asked.append(k.__name__[-3:]), f(*a, **o))[1]
        )
    qkv = [jax.ShapeDtypeStruct((8, 35, 35, 2, 32), "bfloat16")] * 3
    loss = jax.grad(lambda q, k, v: attend(q, k, v, window=7).astype("float32").sum())
    traced = jax.jit(loss).trace(*qkv)
    traced.lower(lowering_platforms=("cpu",))
    assert asked == []
    traced.lower(lowering_platforms=("tpu",))
    assert set(asked) == {"tpu"}
