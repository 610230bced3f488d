"""The TPU kernels of routed attention: interpreted on the CPU, and compiled by the TPU's own compiler."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreting import interpreted

import attn
from attn.routed import xla
from attn.routed.api import ROUTED, Settings, routed_attention
from benchmarks import routed_sides, routed_tpu, tpu_cycles
from kernels.routed import oracle, tpu
from kernels.routed.tpu_plan import Plan

NAMES = ("out", "lse", "dq", "dk", "dv")
PLAIN = types.SimpleNamespace(forward=xla.forward, backward=lambda *arrays, **how: xla.backward(*arrays, None, **how))


@dataclasses.dataclass
class Problem:
    """Arguments of both directions as NumPy arrays, rounded to their dtype."""

    regions: tuple[int, int]
    arrays: list[np.ndarray]  # q, k, v
    indices: np.ndarray
    d_out: np.ndarray

    @property
    def options(self):
        return {"regions": self.regions, "scale": 0.3}

    def results(self, implementation, *, compiled=True):
        """What an implementation gives, by name."""

        def run(arrays, indices, d_out):
            out, lse = implementation.forward(*arrays, indices, **self.options)
            return out, lse, *implementation.backward(*arrays, indices, out, lse, d_out, **self.options)

        run = jax.jit(run) if compiled else run
        found = dict(zip(NAMES, run(self.arrays, self.indices, self.d_out), strict=True))
        return {name: np.asarray(value) for name, value in found.items()}

    def errors(self, found):
        """Largest difference from the oracle, relative to the largest number there (or to 1, if that is more)."""
        expected = self.results(oracle, compiled=False)
        return {
            name: np.abs(value.astype(np.float64) - expected[name]).max() / max(1.0, np.abs(expected[name]).max())
            for name, value in found.items()
        }


def problem(regions, places, heads, topk, *, head_dim=32, batch=1, dtype=np.float32, indices=None):
    random = np.random.default_rng(0)
    shape = (batch, regions[0] * places[0], regions[1] * places[1], heads, head_dim)
    *arrays, d_out = (random.standard_normal(shape).astype(dtype) for _ in range(4))
    count = regions[0] * regions[1]
    if indices is None:
        indices = [[random.permutation(count)[:topk] for _ in range(count)] for _ in range(batch)]
    return Problem(regions, arrays, np.asarray(indices, np.int32), d_out)


def check(found, given, tolerance=1e-5):
    for name, error in given.errors(found).items():
        assert error <= tolerance, f"{name} is off by {error}"  # NaN fails


@pytest.mark.parametrize(
    ("regions", "places", "heads", "topk", "options"),
    [
        ((1, 3), (4, 4), 4, 2, {"batch": 2}),  # stage 2: two regions fill the lanes, and the last block is half empty
        ((1, 3), (4, 4), 6, 2, {}),  # two parts of the lanes, of which the second takes blocks of four regions
        ((2, 2), (8, 8), 2, 1, {}),  # stage 1: one region fills the lanes, half of which hold channels
        ((1, 2), (8, 8), 3, 1, {}),  # one region has more queries than lanes
        ((2, 1), (2, 8), 1, 2, {"head_dim": 128}),
    ],
)
def test_results_and_gradients_agree_with_the_oracle(regions, places, heads, topk, options):
    given = problem(regions, places, heads, topk, **options)
    assert tpu.refuse(*given.arrays, given.indices, regions=regions) is None
    with interpreted():
        check(given.results(tpu), given)


def test_bfloat16_loses_no_more_than_the_plain_path_does():
    given = problem((1, 2), (4, 4), 4, 2, dtype=jnp.bfloat16)
    with interpreted():
        found = given.results(tpu)
    assert all(found[name].dtype == jnp.bfloat16 for name in NAMES if name != "lse")
    lost, plain = given.errors(found), given.errors(given.results(PLAIN))
    for name, error in lost.items():
        # A loss may be small by luck: it counts as half a unit in the last place at least.
        rounding = 0.5 * float(jnp.finfo(jnp.bfloat16).eps)
        allowed = 1e-5 if name == "lse" else 2 * max(plain[name], rounding)
        assert error <= allowed, f"{name} is off by {error}, allowed {allowed}"


def test_a_region_gets_the_gradients_of_all_that_see_it_and_others_get_none():
    """Region 0 is seen by all, region 3 by the last one, which names it twice; nobody sees 1 and 2, which are NaN."""
    given = problem((1, 4), (4, 4), 4, 2, indices=[[[0, 3], [0, 0], [0, 0], [3, 3]]])
    for array in given.arrays[1:]:
        array[:, :, 4:12] = np.nan
    with interpreted():
        found = given.results(tpu)
        again = given.results(tpu)
    for name in NAMES:
        np.testing.assert_array_equal(found[name], again[name], err_msg=name)  # the same bits
    for name in ("dk", "dv"):
        assert not found[name][:, :, 4:12].any()
        assert found[name][:, :, :4].all()
    for array in given.arrays[1:]:
        array[:, :, 4:12] = 0.0
    check(found, given)


def test_what_a_region_sees_stays_out_of_the_others_of_its_block():
    given = problem((1, 2), (4, 4), 4, 1, indices=[[[0], [1]]])
    assert Plan((1, 2), (4, 4), 4, 32, 1).block(Plan((1, 2), (4, 4), 4, 32, 1).parts[0]) == 2
    with interpreted():
        clean = given.results(tpu)
        for array in (*given.arrays, given.d_out):
            array[:, :, 4:] = np.nan
        found = given.results(tpu)
    for name in NAMES:
        np.testing.assert_array_equal(found[name][:, :, :4], clean[name][:, :, :4], err_msg=name)


@pytest.mark.smoke
def test_blocks_fill_the_lanes_and_passes_hold_all_regions():
    for heads, places, topk in ((2, 8, 1), (3, 8, 1), (4, 4, 4), (6, 4, 4)):
        plan = Plan((7, 7), (places, places), heads, 32, topk)
        assert plan.keys == 64
        assert sum(part.heads for part in plan.parts) == heads
        assert plan.passes == 1
        assert plan.count <= plan.padded <= plan.count + max(plan.block(part) for part in plan.parts) - 1
        for part in plan.parts:
            assert plan.together % plan.block(part) == 0
            assert plan.block(part) * plan.columns(part) >= 96
    large = Plan((7, 7), (16, 16), 2, 32, 1)
    assert (large.together, large.passes) == (7, 7)


def choice(shape=(1, 28, 28, 4, 32), dtype=jnp.bfloat16, *, keys=None, regions=(7, 7), topk=4, asked=()):
    q = jax.ShapeDtypeStruct(shape, dtype)
    k = jax.ShapeDtypeStruct(keys or shape, dtype)
    indices = jax.ShapeDtypeStruct((shape[0], regions[0] * regions[1], topk), jnp.int32)
    return ROUTED.choose("tpu", (q, k, k, indices), Settings(regions, 0.3), asked)


def test_what_the_kernel_does_not_have_is_refused(monkeypatch):
    assert choice().implementation == "tpu"
    assert choice((8, 56, 56, 3, 32), topk=1).implementation == "tpu"
    for reason, made in {
        "float16": choice(dtype=jnp.float16),
        "no look at the maps": choice(asked=("look at the maps",)),
        "of the shape of the queries": choice(keys=(1, 14, 14, 4, 32)),
        "head dim 24": choice((1, 28, 28, 4, 24)),
        "regions of 4 places": choice((1, 14, 14, 8, 32), topk=16),
    }.items():
        # Gathered, where that is a small part of the map and where maps are looked at.
        assert made.implementation == ("dense" if reason == "regions of 4 places" else "xla")
        assert reason in made.refused["tpu"], made.refused
    monkeypatch.setattr(tpu, "chip_memory", lambda: 2**20)
    assert "MiB on the chip" in choice().refused["tpu"]


def test_the_operator_runs_the_kernel_forward_and_backward():
    given = problem((1, 2), (4, 4), 2, 1)

    def loss(*arrays):
        out = routed_attention(*arrays, given.indices, **given.options, implementation="tpu")
        return (out * given.d_out).sum()

    calls = attn.explain(jax.grad(loss, argnums=(0, 1, 2)), *given.arrays).calls
    assert {call.choices["tpu"].implementation for call in calls} == {"tpu"}


@pytest.mark.parametrize("gather", routed_tpu.GATHERS)
def test_the_benchmark_compares_with_the_same_function(gather):
    """A cotangent of its own for every place, so that the gradients see all of it too."""
    given = problem((2, 2), (2, 3), 2, 2, batch=2)
    shape = given.d_out.shape[:3]
    packed = [array.reshape(*shape, -1) for array in (*given.arrays, given.d_out)]
    arguments = (*packed[:3], given.indices, packed[3])
    ours = routed_sides.operator(*arguments, heads=2, regions=2, name="xla")
    for one, other in zip(ours, routed_sides.xla(*arguments, heads=2, regions=2, gather=gather), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.plan
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_both_kernels_compile_and_float32_is_multiplied_in_full(chip):
    """Seen in the schedule: products of float32 take several passes of the matrix unit, those of bfloat16 one."""
    pytest.importorskip("libtpu")
    used = {}
    for kind in ("bf16", "f32"):
        packed = f"{kind}[2,8,12,128]"
        report = tpu_cycles.measure(
            "tests.routed_compiled:both_directions",
            *[packed] * 3,
            "s32[2,6,2]",
            packed,
            chip=chip,
            heads=4,
            regions=[2, 3],
        )
        assert not report.unknown
        used[kind] = {use.name.split(".")[0]: use.cost.slots["MATMUL"] for use in report.kernels}
    assert set(used["bf16"]) == {"routed_attention_forward", "routed_attention_backward"}
    for name, passes in used["bf16"].items():
        assert used["f32"][name] >= 3 * passes, used
