"""Counting cycles of TPU kernels: the compiler's dumps, on texts small enough to count by hand and on real kernels."""

import textwrap

import jax
import pytest

from benchmarks import llo, tpu_cycles

# Two nested loops of 5 and (10 - 1) / 3 = 3 passes; on a v5e, four bundles after a branch belong to its loop.
STAGE = """
$region0: #{k.1}
  #allocation3 [shape = 'u8[8192]{0}', space=vmem, size = 0x2000, scoped, tag = 'input window']
  loop: start=0, step=1, limit=5
  $region10: #{k.1} parent=0 // loop_pre_header
    %s1_s1 = smov.u32 0
  $region11: #{k.1} parent=0 // loop_body
    loop: start=1, step=3, limit=10
    $region20: #{k.1} parent=11 // loop_pre_header
    $region21: #{k.1} parent=11 // loop_body
      %v1_v1 = vadd.f32 %v0_v0, %v0_v0
    $region30: #{k.1} parent=11 // pred_region
"""
SCHEDULE = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s5_s5 = int_to_ptr.hbm [resolvable:$true] %s4_s4  ;;  %s7_s7 = smov.u32 [#allocation3] }
   0x1 LB: > { %1 = dma.hbm_to_vmem [thread:$0]  (%p1_p1), /*hbm=*/%s2_s2, /*size_in_granules=*/128, /*vmem=*/%s3_s3 /*
base_bounds: (5, 1)
strides: (1, 1) */ } /* Start region 11 */
   0x2   : > { %2 = sbr.rel (%p3_p3) target = $region30  ;;  %s8_s8 = scalar_lea.vmem [#allocation3], 8 }
   0x3 LB: >> { %v1_v1 = vadd.f32 %v0_v0, %v0_v0 } /* Start region 21 :: Start region 22 */
   0x4   : >> { %3 = sbr.rel (!%p2_p2) target = $region21 }
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
   0x8   : > { %9 = dma.general /*src=*/%s8_s8, /*size_in_granules=*/10, /*dst=*/%s5_s5 /* vmem-to-hbm */ }
   0x9   : > { %4 = dma.general /*src=*/%s5_s5, /*size_in_granules=*/3, /*dst=*/%s7_s7, /*flag=*/%s6 }
   0xa   : > { %5 = sbr.rel (!%p4_p4) target = $region11 }
   0xb   :  {}
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  { %6 = dma.vmem_to_smem /*vmem=*/%s2_s2, /*size_in_granules=*/64, /*smem=*/%s3_s3 }
"""
OUTER = 5 * (2 + 3 * 6 + 6)  # the inner loop is 0x3 to 0x8
CYCLES = 1 + OUTER + 1
ROWS = ["0 0 0 0"] * 3 + ["4 1 0 0"] + ["0 0 0 1"] * 12
TABLE = "\n".join(["== CAPACITY:", "MATMUL, VALU, VSTORE, VSTORE:SPILL", "  4   4   1   1", "== UTILIZATION:", *ROWS])


def count(stage=STAGE, schedule=SCHEDULE, table=TABLE, chip="v5e"):
    return llo.read(schedule, stage, table, chip)


def test_bundles_count_as_often_as_their_loops_run():
    kernel = count()
    assert kernel.cycles == CYCLES
    assert not kernel.unknown


def test_slots_count_with_their_bundles():
    kernel = count()
    assert kernel.slots["MATMUL"] == 5 * 3 * 4
    assert kernel.share("MATMUL") == 5 * 3 / CYCLES
    assert kernel.busiest == "MATMUL"
    assert kernel.spills == 5 * (3 * 5 + 6) + 1


def test_copies_of_main_memory_count_in_granules():
    kernel = count()
    assert kernel.bytes_in == 32 * 5 * (128 + 3)
    assert kernel.bytes_out == 32 * 5 * 3 * 10
    assert count(chip="v4").bytes_in == 512 * 5 * (128 + 3)


def test_a_copy_that_waits_for_the_end_of_a_loop_counts_once():
    """It stands in a delay slot, under the condition that the branch back is not taken."""
    copy = "dma.general /*src=*/%s8_s8"
    for condition, times in (("(%p2_p2)", 1), ("(!%p2_p2)", 3), ("(%p4_p4)", 3)):
        schedule = SCHEDULE.replace(copy, copy.replace("general ", f"general {condition}, "))
        assert count(schedule=schedule).bytes_out == 32 * 5 * times * 10


def test_delay_slots_are_those_of_the_chip():
    # 1: the inner loop is 0x3 to 0x5, the outer one ends with 0xb. 6: they end with 0xa and with the last bundle.
    assert count(chip="v4").cycles == 1 + 5 * (2 + 3 * 3 + 6) + 4
    assert count(chip="tpu7x").cycles == 1 + 5 * (2 + 3 * 8 + 5)


@pytest.mark.parametrize(
    ("edit", "cycles", "words"),
    [
        (("stage", "limit=10", "limit=11"), CYCLES + 5 * 6, None),
        (("stage", "start=1, step=3", "start=1, step=1"), CYCLES + 5 * 6 * 6, None),
        (("stage", "    loop: start=1, step=3, limit=10\n", ""), CYCLES - 5 * 2 * 6, "a loop of 6 bundles"),
        (("schedule", "size_in_granules=*/10,", "size_in_granules=*/%s9_s9,"), CYCLES, "from vmem to hbm, size %s9_s9"),
        (("schedule", "%s8_s8 = scalar_lea.vmem", "%s0_s0 = scalar_lea.vmem"), CYCLES, "a copy from ? to hbm"),
    ],
)
def test_what_cannot_be_counted_is_said(edit, cycles, words):
    which, old, new = edit
    text = {"stage": STAGE, "schedule": SCHEDULE}[which]
    assert old in text
    kernel = count(**{which: text.replace(old, new)})
    assert kernel.cycles == cycles
    assert (words is None) == (not kernel.unknown)
    assert words is None or words in kernel.unknown[0]


def test_dumps_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="16 bundles in the schedule and 15"):
        count(table=TABLE.rsplit("\n", 1)[0])
    with pytest.raises(ValueError, match="no beginning"):
        count(schedule=SCHEDULE.replace("Start region 21 ::", ""))
    with pytest.raises(ValueError, match="no bundles"):
        count(schedule="")


KERNELS = """
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def looped(x, outer=1, inner=1, blocks=4):
    def kernel(x_ref, o_ref):
        def body(_, carry):
            return jax.lax.fori_loop(0, inner, lambda _, c: jnp.tanh(c) * 1.5, carry)
        o_ref[...] = jax.lax.fori_loop(0, outer, body, x_ref[...])
    block = pl.BlockSpec((8, 128), lambda i: (i, 0))
    return pl.pallas_call(
        kernel, grid=(blocks,), in_specs=[block], out_specs=block, out_shape=x, name="looped"
    )(x)


def repeated(x):
    return jax.lax.fori_loop(0, 6, lambda _, x: looped(x, 3, 5), x + 1)


def unbounded(n, x):
    def kernel(n_ref, x_ref, o_ref):
        o_ref[...] = jax.lax.fori_loop(0, n_ref[0], lambda _, c: jnp.tanh(c) * 1.5, x_ref[...])
    return pl.pallas_call(
        kernel, out_shape=x, in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec()], name="unbounded"
    )(n, x)
"""


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    (tmp_path / "few_kernels.py").write_text(textwrap.dedent(KERNELS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "few_kernels"


@pytest.mark.plan
def test_loops_inside_a_real_kernel_are_counted(kernels):
    pytest.importorskip("libtpu")
    x = jax.ShapeDtypeStruct((32, 128), "float32")

    def cycles(outer, inner):
        (use,) = tpu_cycles.measure(f"{kernels}:looped", x, outer=outer, inner=inner).kernels
        assert (use.count, use.cost.unknown) == (1, ())
        return use.cost.cycles

    few, more = cycles(11, 7), cycles(11, 17)
    # The grid has two passes more than blocks, one to begin and one to end the copies; all of them count in full.
    one = (more - few) / ((4 + 2) * 11 * 10)
    assert one == int(one) > 5


@pytest.mark.plan
def test_kernels_in_loops_of_the_program_count_as_often_as_they_run(kernels):
    pytest.importorskip("libtpu")
    report = tpu_cycles.measure(f"{kernels}:repeated", "f32[32,128]", chip="v6e")
    (use,) = report.kernels
    assert use.count == 6
    assert report.cycles == 6 * use.cost.cycles
    assert report.xla_cycles > 0
    assert not report.unknown


@pytest.mark.plan
def test_a_loop_that_data_bound_is_reported(kernels):
    pytest.importorskip("libtpu")
    report = tpu_cycles.measure(f"{kernels}:unbounded", "s32[1]", "f32[8,128]")
    assert len(report.unknown) == 1
    assert "unbounded.1: a loop of" in report.unknown[0]
    assert "NOT COUNTED: unbounded.1" in report.table()


@pytest.mark.plan
def test_who_asks_for_the_impossible_is_told(kernels):
    pytest.importorskip("libtpu")
    with pytest.raises(tpu_cycles.DoesNotCompile, match=r"AttributeError.*missing"):
        tpu_cycles.measure(f"{kernels}:missing", "f32[8,128]")
    with pytest.raises(ValueError, match="chip='v9'; allowed: v4, v5e"):
        tpu_cycles.measure(f"{kernels}:looped", "f32[8,128]", chip="v9")
