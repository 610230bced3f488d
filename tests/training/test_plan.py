"""Plans: real train steps compiled for TPUs on this machine, and what is made of the result."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from compiling import for_tpus, needs_compiler

import configs
from training.plans import chips, hlo_cost, plan, plan_report

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HIDDEN, DEPTH, HEADS, CLASSES, PATCHES = 128, 512, 3, 2, 1000, 16


def small(**overrides):
    """A ViT with tokens enough that every product is one, and shards that tile well."""
    return tiny.config(
        **{
            "model__name": "vit_ti16",
            "model__options": dict(depth=DEPTH, width=WIDTH, heads=HEADS, mlp_width=HIDDEN),
            "data__name": "imagenet2012",
            "data__image_size": 64,
            "data__batch_size": 128,
            "data__train_transforms": "random_resized_crop({size})|flip|normalize",
            "train__precision": "bfloat16",
            "optim__ema": 0.999,
            "optim__clip_norm": 1.0,
            **overrides,
        }
    )


@pytest.fixture(scope="module", autouse=True)
def compiler():
    with for_tpus():
        yield


@pytest.fixture(scope="module")
def twins():
    """Plans of a scanned and of an unrolled model."""
    topology = chips.parse("v5e:2x2")
    return [plan.make(small(mesh__fsdp=4, model__scan=scan), topology) for scan in (True, False)]


def logits_again():
    """FLOPs of the products that a backward pass computes again: the logits of dense attention, whose maps are not
    kept.
    """
    return 2 * 128 // 4 * DEPTH * (PATCHES + 1) ** 2 * WIDTH


def by_kind(made):
    return {(one.kind, one.network): one.sent for one in made.exchanges}


@pytest.mark.plan
@needs_compiler
def test_scanned_and_unrolled_plans_agree(twins):
    scanned, unrolled = twins
    assert scanned.cost.flops == unrolled.cost.flops
    assert scanned.cost.product_bytes == pytest.approx(unrolled.cost.product_bytes, rel=0.02)
    assert by_kind(scanned) == pytest.approx(by_kind(unrolled), rel=0.02)
    assert scanned.least_seconds == pytest.approx(unrolled.least_seconds, rel=0.02)
    assert scanned.parts == unrolled.parts
    assert scanned.kept < unrolled.kept  # a scan computes norms and activations again
    assert not scanned.cost.unknown_loops
    assert not unrolled.cost.unknown_loops


@pytest.mark.plan
@needs_compiler
def test_flops_are_three_forward_passes_without_the_gradient_of_the_images(twins):
    tokens, images = PATCHES + 1, 128 // 4
    block = 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 2 * tokens * WIDTH * HIDDEN
    embedding = PATCHES * WIDTH * 3 * 16**2
    forward = 2 * images * (embedding + DEPTH * block + WIDTH * CLASSES)
    for made in twins:
        assert made.forward_flops == forward
        assert made.cost.flops == 3 * forward - 2 * images * embedding + logits_again()


@pytest.mark.plan
@needs_compiler
def test_memory_of_a_device(twins):
    made, _ = twins
    parameters = (
        3 * 16**2 * WIDTH + WIDTH  # embedding
        + (PATCHES + 1) * WIDTH + WIDTH  # positions, class token
        + DEPTH * (4 * WIDTH**2 + 4 * WIDTH + 2 * WIDTH * HIDDEN + HIDDEN + WIDTH + 4 * WIDTH)
        + 2 * WIDTH + WIDTH * CLASSES + CLASSES  # norm, head
    )  # fmt: skip
    share = 4 * parameters / 4
    assert share <= made.parts["parameters"] < 1.1 * share  # vectors and odd sizes are whole on every device
    assert made.parts["moving average"] == made.parts["parameters"]
    assert made.parts["optimizer"] == pytest.approx(2 * made.parts["parameters"], rel=1e-3)
    assert made.parts["batch"] == 32 * (64 * 64 * 3 + 2) * 4  # image, label, valid
    assert sum(made.parts.values()) <= made.arguments < 2 * sum(made.parts.values()) + 2**20
    assert made.memory < chips.CHIPS["v5e"].usable_hbm


@pytest.mark.plan
@needs_compiler
def test_the_report_names_every_figure(twins):
    text = plan_report.table(twins[0])
    for word in ("parameters", "optimizer", "moving average", "activations and temporaries", "code", "head-room"):
        assert word in text
    for word in ("arithmetic intensity", "compiler's cycle estimates", "at least", "as compiled", "images/s", "MFU"):
        assert word in text
    for one in twins[0].exchanges:
        assert f"{one.kind} (ICI)" in text
        assert f"{one.count} x  {one.sent / 1e6:.3f} MB sent" in text


@pytest.mark.plan
@needs_compiler
def test_two_slices_of_sums_between_them():
    made = plan.make(small(mesh__fsdp=4, model__options=dict(depth=1, width=128, heads=2)), chips.parse("2*v5e:2x2"))
    sent = by_kind(made)
    assert {network for _, network in sent} == {"ICI", "DCN"}
    # Between the slices go the gradients that a device keeps: a quarter of the matrices in bfloat16, and vectors.
    gradients = made.parts["parameters"] / 2
    assert gradients <= sent["all-reduce", "DCN"] < 2 * gradients
    assert made.exchange_seconds("DCN") > 0


@pytest.mark.plan
@needs_compiler
def test_gradients_are_summed_over_all_devices():
    options = dict(depth=2, width=WIDTH, heads=2, mlp_width=HIDDEN)
    made = plan.make(small(model__options=options), chips.parse("tpu7x:2x2x1"))
    # In bfloat16, twice 7/8 of each; a SparseCore may do it.
    gradients = made.parts["parameters"] / 2
    assert 1.75 * gradients <= by_kind(made)["all-reduce", "ICI"] < 1.9 * gradients


@pytest.mark.plan
@needs_compiler
def test_tensor_parallel_on_a_chip_with_a_sparse_core():
    options = dict(depth=1, width=WIDTH, heads=2, mlp_width=HIDDEN)
    made = plan.make(small(mesh__tensor=2, mesh__fsdp=2, model__options=options), chips.parse("v5p:2x2x1"))
    assert made.axes == {"data": 1, "fsdp": 2, "tensor": 2}
    # `forward_flops` is half of the model's; were the products not shared, this would be 6.
    assert 2.8 < made.cost.flops / made.forward_flops < 3.2
    assert by_kind(made)["all-reduce", "ICI"] > 0


@pytest.mark.plan
@needs_compiler
def test_what_does_not_fit_is_one_line():
    done = subprocess.run(
        [sys.executable, "train.py", "--config=configs/vit_b16_imagenet.py", "--plan=v5e:1x1"]
        + [f"--config.{change}" for change in ("data.batch_size=2048", "model.options.depth=2", "optim.name=sgd")],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: vit_b16 with data.batch_size=2048 does not fit on v5e:1x1: a step needs ")
    assert "there are 15.75 GiB" in line
    assert "--config.model.remat=full" in line


# --- without the compiler ---------------------------------------------------------------------------------------------


def linear(slope, base, limit):
    """A step whose memory grows along a line, and the batches that were tried."""
    tried = []

    def memory(batch):
        tried.append(batch)
        needed = base + slope * batch
        if needed > limit:
            raise plan.DoesNotFit("too large", needed, limit)
        return needed

    return memory, tried


@pytest.mark.parametrize(("first", "multiple"), [(64, 8), (512, 8), (600, 8), (8, 8)])
def test_largest_batch_of_a_line_takes_two_more_compilations(first, multiple):
    memory, tried = linear(slope=10.0, base=1000.0, limit=9005.0)
    batch, needed = plan.largest_batch(memory, (first, 1000 + 10.0 * first), 9005.0, multiple)
    assert (batch, needed) == (800, 9000.0)
    assert len(tried) == 2


def test_largest_batch_goes_on_where_a_line_misleads():
    limit = 10_000.0

    def memory(batch):
        needed = 1000 + 5.0 * batch if batch <= 256 else 2280 + 10.0 * (batch - 256)
        if needed > limit:
            raise plan.DoesNotFit("too large", needed, limit)
        return needed

    batch, needed = plan.largest_batch(memory, (128, 1640.0), limit, 8)
    assert batch % 8 == 0
    assert needed <= limit
    assert 900 < batch <= 1028


def test_largest_batch_may_be_the_first():
    memory, _ = linear(slope=10.0, base=1000.0, limit=1085.0)
    assert plan.largest_batch(memory, (8, 1080.0), 1085.0, 8) == (8, 1080.0)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("required for HLO temporaries (653.86G) exceeds available HBM (15.75G).", 653.86),
        ("Ran out of memory in memory space hbm. Used 16.20G of 15.75G hbm. Exceeded", 16.2),
        ("required for HLO temporaries (1.50T) exceeds available HBM (95.73G).", 1536),
        ("RESOURCE_EXHAUSTED: no more threads", None),
    ],
)
def test_the_compilers_complaints(message, gib):
    found = plan.needed_bytes(message)
    assert found == (None if gib is None else pytest.approx(gib * chips.GIB))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5e", "no topology"),
        ("v5e:", "v5e:16x16"),
        ("v9:2x2", "'v9', there are v5e, v5p, v6e, tpu7x"),
        ("v5p:2x2", "v5p has 3 axes"),
        ("v5e:32x32", "at most 256 chips"),
        ("0*v5e:2x2", "2*v5e:16x16"),
    ],
)
def test_wrong_topologies_are_one_line(text, words):
    with pytest.raises(ValueError, match=r"^--plan=") as error:
        chips.parse(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.plan
@needs_compiler
@pytest.mark.parametrize(
    ("text", "devices"), [("v5e:16x16", 256), ("v5p:8x16x16", 2048), ("tpu7x:2x2x1", 8), ("2*v6e:2x2", 8)]
)
def test_topologies(text, devices):
    topology = chips.parse(text)
    assert str(topology) == text
    assert len(topology.devices()) == devices


@pytest.mark.plan
@needs_compiler
def test_a_grid_that_the_compiler_refuses_is_one_line():
    with pytest.raises(ValueError, match="not divisible") as error:
        chips.parse("v5e:3x5").devices()
    assert "\n" not in str(error.value)


@dataclasses.dataclass
class At:
    """A device at a place of the torus."""

    coords: tuple


@pytest.mark.parametrize(
    ("text", "places", "ports"),
    [
        ("v5e:16x16", [(x, y) for x in range(16) for y in range(16)], 4),
        ("v5e:16x16", [(x, 3) for x in range(16)], 2),
        ("v5e:16x16", [(x, 3) for x in range(8)], 1),
        ("v5e:8x8", [(x, y) for x in range(8) for y in range(8)], 2),  # open: no way around
        ("v5p:4x4x4", [(x, y, 0) for x in range(4) for y in range(4)], 4),
        ("v5p:2x2x1", [(x, y, 0) for x in range(2) for y in range(2)], 2),
        ("tpu7x:2x2x1", [(0, 0, 0), (0, 0, 0)], 0),
    ],
)
def test_ports_of_an_exchange(text, places, ports):
    assert chips.parse(text).ports([At(place) for place in places]) == ports


def test_clocks_are_those_of_chips():
    assert {name: round(chip.clock / 1e9, 2) for name, chip in chips.CHIPS.items()} == {
        "v5e": 1.5,
        "v5p": 1.75,
        "v6e": 1.75,
        "tpu7x": 2.2,
    }


def example(collectives, **changes):
    """A plan of round numbers on 4 chips of v5e."""
    topology = chips.parse("v5e:2x2")
    cost = hlo_cost.Cost(flops=197e9, product_bytes=1e9, memory_bytes=819e6, cycles=3e6, collectives=collectives)
    devices = [At((x, y)) for x in range(2) for y in range(2)]
    values = dict(
        topology=topology,
        axes={"data": 1, "fsdp": 4, "tensor": 1},
        model="m",
        precision="bfloat16",
        batch_size=64,
        parts={"parameters": 40, "batch": 60},
        arguments=110,
        outputs=5,
        temporaries=1000,
        code=10,
        kept=500,
        forward_flops=197e9 / 3,
        cost=cost,
        exchanges=plan._exchanges(cost, topology, devices),
        compile_seconds=1.0,
        unit="images",
        units_per_example=1,
    )
    return plan.Plan(**{**values, **changes})


def test_time_of_a_step():
    # 4 devices on an open 2 x 2 grid send over 2 ports of 50 GB/s.
    alone = hlo_cost.Collective("all-gather", 100_000_000 // 3, "{}", overlapped=False)
    beside = hlo_cost.Collective("all-reduce", 20_000_000, "{}", overlapped=True)
    made = example({alone: 1, beside: 10})
    assert made.compute_seconds == pytest.approx(1e-3)
    assert made.memory_seconds == pytest.approx(1e-3)
    assert made.cycle_seconds == pytest.approx(3e6 / 1.503e9, rel=1e-3)
    assert made.exchange_seconds() == pytest.approx(1e-3 + 3e-3)
    assert made.least_seconds == pytest.approx(4e-3)
    # What runs beside takes 3 ms, 1 ms more than there is to run beside.
    assert made.exposed_seconds == pytest.approx(1e-3 + 3e-3 - made.cycle_seconds)
    assert made.step_seconds == pytest.approx(4e-3)
    assert made.utilization(made.step_seconds) == pytest.approx(0.25)
    assert made.memory == 110 + 5 + 1000 + 10


def test_recomputation_does_not_raise_the_utilization():
    made = example({}, forward_flops=197e9 / 4)
    assert made.utilization(1e-3) == pytest.approx(0.75)


def test_a_set_that_is_not_here():
    config = tiny.config(data__name="imagenet2012", data__directory="nowhere")
    source = plan._source(config)
    assert (len(source), source.info.num_classes) == (1_281_167, 1000)
    with pytest.raises(FileNotFoundError, match=r"synthetic:classes=\.\.\.,examples=\.\.\.,size=\.\.\.") as error:
        plan._source(configs.replace(config, data__name="my_set"))
    assert "\n" not in str(error.value)


def test_the_compiler_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install libtpu"):
        chips.use_compiler()
