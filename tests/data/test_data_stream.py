"""The stream is a pure function of (seed, position): nothing else may change a batch."""

import numpy as np
import pytest
from PIL import Image

import data
from data import evaluation
from data.position import TABLE_EXAMPLES, example_at
from data.stream import Chunks

TRANSFORMS = "random_resized_crop(12)|flip|randaugment(2, 9)|color_jitter(0.3)|normalize|erase(0.5)"
BATCH = 24
BLACK = np.zeros((4, 2, 2, 1), np.uint8)


@pytest.fixture(scope="module")
def source():
    return data.open_source("synthetic:classes=5,examples=70,size=16", "train")


def collect(source, count, **options):
    options = {"transforms": TRANSFORMS, "batch_size": BATCH, "seed": 3, **options}
    with data.train_stream(source, **options) as stream:
        return [next(stream) for _ in range(count)]


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name])


@pytest.fixture(scope="module")
def reference(source):
    return collect(source, 7, threads=0)


def test_batches_hold_every_field(reference):
    batch = reference[0]
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "index": ((BATCH,), "int64"),
        "image": ((BATCH, 12, 12, 3), "float32"),
        "label": ((BATCH,), "int64"),
    }
    np.testing.assert_array_equal(batch["label"], batch["index"] % 5)


def rows(index, processes, batch_size=BATCH):
    """The rows of one of several processes that share a batch in order."""
    size = batch_size // processes
    return range(index * size, (index + 1) * size)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("threads", [0, 3])
def test_processes_and_threads_do_not_change_the_global_batch(source, reference, processes, threads):
    shares = [collect(source, 7, rows=rows(index, processes), threads=threads) for index in range(processes)]
    for step in range(7):
        assert_same(joined([share[step] for share in shares]), reference[step])


def test_a_process_may_hold_rows_that_are_no_neighbours(source, reference):
    chosen = [*range(4, 8), *range(12, 16)]
    for got, whole in zip(collect(source, 3, rows=chosen), reference, strict=False):
        assert_same(got, {name: value[chosen] for name, value in whole.items()})


def test_chunks_do_not_change_the_batch(source, reference, monkeypatch):
    monkeypatch.setattr("data.stream.CHUNK_EXAMPLES", 5)
    for got, expected in zip(collect(source, 7), reference, strict=True):
        assert_same(got, expected)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_batch(source, reference, workers, monkeypatch):
    monkeypatch.setattr("data.stream.CHUNK_EXAMPLES", 7)
    for got, expected in zip(collect(source, 7, workers=workers), reference, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_continues_at_any_position_on_any_number_of_processes(source, reference, processes):
    with data.train_stream(source, transforms=TRANSFORMS, batch_size=BATCH, seed=3) as first:
        for _ in range(3):
            next(first)
        position = first.position
    assert position == 3 * BATCH
    shares = [collect(source, 4, position=position, rows=rows(index, processes)) for index in range(processes)]
    for step in range(4):
        assert_same(joined([share[step] for share in shares]), reference[3 + step])


def test_a_position_belongs_to_the_example_and_not_to_the_batch(source, reference):
    """Another batch size from the same position sees the same examples with the same augmentation."""
    whole = joined(reference)
    parts = joined(collect(source, 3, batch_size=10, position=17))
    assert_same(parts, {name: value[17:47] for name, value in whole.items()})


def test_every_epoch_is_another_permutation(source):
    order = joined(collect(source, 6, batch_size=35, transforms=""))["index"].reshape(3, 70)
    for epoch in order:
        assert sorted(epoch) == list(range(70))
    assert len({tuple(epoch) for epoch in order}) == 3
    other = joined(collect(source, 2, batch_size=35, transforms="", seed=4))["index"]
    assert tuple(other) not in {tuple(epoch) for epoch in order}
    assert (order[0] != np.arange(70)).mean() > 0.8


@pytest.mark.parametrize("examples", [1, 2, 97, TABLE_EXAMPLES + 7])
def test_orders_are_permutations_and_epochs_of_neighbouring_seeds_differ(examples):
    first = [example_at(0, place, examples) for place in range(min(examples, 5000))]
    assert len(set(first)) == len(first)
    assert 0 <= min(first) <= max(first) < examples
    if examples > 90:
        second_epoch = [example_at(0, examples + place, examples) for place in range(90)]
        next_seed = [example_at(1, place, examples) for place in range(90)]
        assert len({tuple(first[:90]), tuple(second_epoch), tuple(next_seed)}) == 3


def test_repeated_augmentation_repeats_examples_and_not_pixels(source):
    batch = collect(source, 1, repeats=3)[0]
    groups = batch["index"].reshape(-1, 3)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0])) == BATCH // 3
    images = batch["image"].reshape(-1, 3, 12 * 12 * 3)
    assert (images[:, 0] != images[:, 1]).any(axis=-1).all()
    resumed = collect(source, 1, repeats=3, position=BATCH)[0]
    assert_same(resumed, collect(source, 2, repeats=3)[1])


def test_augmentation_differs_between_positions_and_epochs(source):
    batches = joined(collect(source, 7))
    images = {image.tobytes() for image in batches["image"]}
    assert len(images) == len(batches["image"])


# Evaluation


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [16, 28, 100])
def test_evaluation_sees_every_example_once_in_equally_many_steps(source, processes, batch_size):
    counts, seen = set(), []
    for index in range(processes):
        batches = data.eval_batches(
            source,
            transforms="resize(8)|normalize",
            batch_size=batch_size,
            rows=rows(index, processes, batch_size),
        )
        got = list(batches)
        counts.add((len(batches), len(got)))
        for batch in got:
            assert len(batch["valid"]) == batch_size // processes
            assert batch["valid"].dtype == np.float32
            assert np.isfinite(batch["image"]).all()
            seen += batch["index"][batch["valid"] == 1].tolist()
    assert counts == {(-(-70 // batch_size), -(-70 // batch_size))}
    assert sorted(seen) == list(range(70))


@pytest.mark.parametrize("threads", [0, 2])
def test_several_sets_are_evaluated_again_and_again_by_the_same_workers(source, threads, monkeypatch):
    """Blanks keep the rounds apart; what breaks off, or comes in another order, costs a new start and nothing else."""
    starts = []
    monkeypatch.setattr(evaluation, "Chunks", lambda *given, **named: starts.append(1) or Chunks(*given, **named))
    options = {"transforms": "random_resized_crop(8)|normalize", "batch_size": 16}
    other = data.open_source("synthetic:classes=5,examples=70,size=16", "train[:20]")
    alone = [joined(list(data.eval_batches(part, **options))) for part in (source, other)]
    starts.clear()
    pool = data.EvalPool([data.eval_pass(part, **options) for part in (source, other)], threads=threads, prefetch=3)
    for number in (0, 1, 0, 1, 0, 1):
        assert_same(joined(list(pool.run(number))), alone[number])
    assert len(starts) == 1
    next(pool.run(0))
    for number in (1, 0, 0, 1):
        assert_same(joined(list(pool.run(number))), alone[number])
    pool.close()
    assert_same(joined(list(pool.run(1))), alone[1])
    pool.close()


def test_a_set_that_breaks_off_leaves_the_others_as_they_are(source, broken):
    options = {"transforms": "resize(8)|normalize", "batch_size": 16}
    pool = data.EvalPool([data.eval_pass(part, **options) for part in (broken, source)])
    for _ in range(2):
        with pytest.raises(data.ExampleError, match="cannot decode image"):
            list(pool.run(0))
        assert_same(joined(list(pool.run(1))), joined(list(data.eval_batches(source, **options))))
    pool.close()


def test_an_endless_pass_begins_again_and_all_of_it_counts(source):
    with data.eval_batches(source, transforms="resize(8)", batch_size=40, endless=True) as batches:
        whole = joined([next(batches) for _ in range(5)])
    np.testing.assert_array_equal(whole["index"], np.arange(200) % 70)
    assert whole["valid"].all()


# Bad examples


@pytest.fixture
def broken(tmp_path):
    for index in range(20):
        folder = tmp_path / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
    (tmp_path / "train" / "a" / "4.png").write_bytes(b"")
    (tmp_path / "train" / "b" / "7.png").write_bytes(b"no image")
    return data.open_source(f"folder:{tmp_path}", "train")


def test_a_corrupt_image_stops_the_stream_with_its_name(broken):
    with pytest.raises(ValueError, match=r"cannot decode image .*(4|7)\.png") as caught:
        collect(broken, 1, batch_size=20)
    assert "\n" not in str(caught.value)


def test_a_corrupt_image_is_replaced_by_the_same_one_everywhere(broken):
    options = {"transforms": "normalize", "batch_size": 20, "seed": 1, "on_error": "replace"}
    with data.train_stream(broken, **options) as stream:
        batches = [next(stream) for _ in range(3)]
        assert stream.stats.replaced == 6
        assert len(stream.stats.messages) == 6
        assert all("png" in message for message in stream.stats.messages)
    bad = {index for index in range(20) if broken.describe(index).endswith(("/4.png", "/7.png"))}
    whole = joined(batches)
    assert len(whole["index"]) == 60
    assert not bad & set(whole["index"].tolist())
    with data.train_stream(broken, **options, position=30, rows=range(10, 20)) as stream:
        np.testing.assert_array_equal(next(stream)["index"], whole["index"][40:50])


def test_a_corrupt_image_is_masked_in_evaluation(broken):
    with data.eval_batches(broken, transforms="normalize", batch_size=8, on_error="replace") as batches:
        valid = joined(list(batches))
        assert batches.stats.replaced == 2
    bad = [index for index in range(20) if broken.describe(index).endswith(("/4.png", "/7.png"))]
    assert sorted(batches.left_out) == bad
    assert all(broken.describe(index) in why for index, why in batches.left_out.items())
    assert valid["valid"].sum() == 18


def test_a_set_without_one_good_example_stops_the_stream(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="20 replacements in a row failed"):
        collect(data.open_source(f"folder:{tmp_path}", "train"), 1, on_error="replace")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": BLACK, "label": np.array([0, 1, 5, 1])}, r"label 5 of example 2 of odd train is not in 0\.\.2"),
        ({"image": BLACK, "label": np.array([0, -1, 1, 1])}, r"label -1 of example 1"),
        (
            {"image": np.where(np.arange(16).reshape(4, 2, 2, 1) == 9, np.nan, 0).astype(np.float32), "label": [0] * 4},
            r"field 'image' of example 2 of odd train holds NaN",
        ),
    ],
)
def test_labels_and_pixels_are_checked(columns, message):
    odd = data.ArraySource(columns, fields={"image": "image", "label": "label"}, name="odd", num_classes=3)
    with pytest.raises(data.ExampleError, match=message):
        collect(odd, 1, transforms="", batch_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1"),
        ({"rows": range(BATCH, BATCH + 2)}, f"rows must be distinct, ascending and in 0..{BATCH - 1}"),
        ({"on_error": "ignore"}, "unknown data.on_error 'ignore'"),
        ({"transforms": "resize(8)|flop"}, "unknown transform 'flop'"),
        ({"transforms": "flip(on='mask')"}, "unknown field in on="),
        ({"repeats": 0}, "data.repeats must be at least 1"),
        ({"position": -1}, "position must be at least 0"),
    ],
)
def test_impossible_arguments_end_in_one_line(source, options, message):
    with pytest.raises(ValueError, match=r".") as caught:
        collect(source, 1, **options)
    assert message in str(caught.value)


def test_images_of_several_shapes_are_refused():
    images = [np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]
    mixed = data.ArraySource({"image": images}, fields={"image": "image"})
    with pytest.raises(ValueError, match=r"field 'image' has shapes .* the transforms must end in one shape"):
        collect(mixed, 1, transforms="", batch_size=2)


def test_a_closed_stream_says_so(source):
    stream = data.train_stream(source, transforms="", batch_size=4, seed=0)
    next(stream)
    stream.close()
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        next(stream)
