"""Every metric against NumPy or scikit-learn in float64, over a masked last batch, in any order of merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from scipy.special import log_softmax, softmax

from tasks import calibration, metrics

pytestmark = pytest.mark.smoke

CLASSES = 7


def examples(count=53, seed=0):
    """Logits and labels of a fair classifier that is too sure of itself."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES - 1, count)  # the last class has no examples
    logits = random.normal(size=(count, CLASSES)) * 2
    logits[np.arange(count), labels] += 2
    index = np.arange(count, dtype=np.int32)
    return {"logits": logits.astype(np.float32), "label": labels.astype(np.int32), "index": index}


def batches(data, size, padding_value=np.nan):
    """Batches of `size`; padding holds NaN logits and label 0, and only `valid` says so."""
    for start in range(0, len(data["label"]), size):
        part = {name: value[start : start + size] for name, value in data.items()}
        missing = size - len(part["label"])
        valid = np.r_[np.ones(size - missing), np.zeros(missing)].astype(np.float32)
        part = {
            name: np.pad(
                value,
                [(0, missing)] + [(0, 0)] * (value.ndim - 1),
                constant_values=padding_value if name == "logits" else 0,
            )
            for name, value in part.items()
        }
        yield {"logits": part.pop("logits")}, {**part, "valid": valid}


def states(metric, data, size=16):
    update = jax.jit(metric.update)
    return [update(metric.init(), outputs, batch) for outputs, batch in batches(data, size)]


def measure(metric, data, size=16):
    state, update = metric.init(), jax.jit(metric.update)
    for outputs, batch in batches(data, size):
        state = update(state, outputs, batch)
    return metric.finish(jax.device_get(state))


def ece(probabilities, labels, bins=15):
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    total = 0.0
    for low in range(bins):
        inside = (confidence > low / bins) & (confidence <= (low + 1) / bins)
        if inside.any():
            total += abs(correct[inside].mean() - confidence[inside].mean()) * inside.mean()
    return total


ALL = {
    "top1": metrics.top_k_accuracy(1),
    "top5": metrics.top_k_accuracy(5),
    "nll": metrics.negative_log_likelihood(),
    "per_class": metrics.per_class_accuracy(CLASSES),
    "confusion": metrics.confusion_matrix(CLASSES),
    "worst": metrics.worst_mistakes(6),
    "ece": calibration.expected_calibration_error(),
    "reliability": calibration.reliability(),
    "calibrated": calibration.temperature_scaling(),
}


def test_accuracy_likelihood_and_confusion_equal_sklearn():
    data = examples()
    labels, logits = data["label"], data["logits"].astype(np.float64)
    expected = sklearn.metrics.accuracy_score(labels, logits.argmax(1))
    assert measure(ALL["top1"], data) == pytest.approx(expected, abs=1e-7)
    expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=5, labels=np.arange(CLASSES))
    assert measure(ALL["top5"], data) == pytest.approx(expected, abs=1e-7)
    expected = sklearn.metrics.log_loss(labels, softmax(logits, 1), labels=np.arange(CLASSES))
    assert measure(ALL["nll"], data) == pytest.approx(expected, rel=1e-6)
    matrix = sklearn.metrics.confusion_matrix(labels, logits.argmax(1), labels=np.arange(CLASSES))
    assert measure(ALL["confusion"], data) == matrix.tolist()
    per_class = measure(ALL["per_class"], data)
    assert per_class["count"] == matrix.sum(1).tolist()
    np.testing.assert_allclose(per_class["accuracy"][:-1], np.diag(matrix)[:-1] / matrix.sum(1)[:-1])
    assert per_class["accuracy"][-1] is None


@pytest.mark.parametrize("name", ALL)
def test_batch_size_does_not_matter(name):
    whole, cut = measure(ALL[name], examples(), 53), measure(ALL[name], examples(), 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), whole, cut)


@pytest.mark.parametrize("name", ALL)
def test_merge_is_associative_and_commutative_with_a_neutral_element(name):
    metric = ALL[name]
    a, b, c = states(metric, examples(48))
    left, right = metric.merge(metric.merge(a, b), c), metric.merge(a, metric.merge(b, c))
    for other in (right, metric.merge(c, metric.merge(b, a)), metric.merge(metric.init(), left)):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), left, other)
    whole = measure(metric, examples(48))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), metric.finish(jax.device_get(left)), whole)


@pytest.mark.parametrize("name", ALL)
def test_forgetting_the_mask_is_noticed(name):
    """The planted fault: the same batches with every padded example taken for a real one."""
    metric, data = ALL[name], examples()
    state = metric.init()
    for outputs, batch in batches(data, 16, padding_value=1.0):
        if name == "worst":  # padding has to be a sure mistake to be able to appear in the list
            outputs["logits"][batch["valid"] == 0, 1] = 50.0
        state = metric.update(state, outputs, {**batch, "valid": np.ones(16, np.float32)})
    faulty = metric.finish(jax.device_get(state))
    assert str(faulty) != str(measure(metric, data))


def test_equal_logits_earn_no_more_than_chance_and_nan_nothing():
    labels = np.arange(CLASSES, dtype=np.int32)
    batch = {"label": labels, "valid": np.ones(CLASSES, np.float32)}
    for logits, expected in [(0.0, 1 / CLASSES), (np.nan, 0.0)]:
        outputs = {"logits": np.full((CLASSES, CLASSES), logits, np.float32)}
        state = ALL["top1"].update(ALL["top1"].init(), outputs, batch)
        assert ALL["top1"].finish(state) == pytest.approx(expected)


def test_mean_takes_values_or_a_mean():
    batch = {"valid": jnp.array([1.0, 1.0, 0.0])}
    values = jnp.array([1.0, 3.0, jnp.nan])
    for function in (lambda o, b: values, lambda o, b: metrics.weighted_mean(values, b)):
        metric = metrics.mean(function)
        state = metric.update(metric.init(), {}, batch)
        state = metric.merge(state, {"sum": jnp.float32(8), "weight": jnp.float32(2)})
        assert metric.finish(state) == 3.0


def test_expected_calibration_error_equals_numpy():
    data = examples(997)
    probabilities = softmax(data["logits"].astype(np.float64), 1)
    assert measure(ALL["ece"], data, 128) == pytest.approx(ece(probabilities, data["label"]), abs=1e-6)
    curve = measure(ALL["reliability"], data, 128)
    assert sum(curve["count"]) == 997
    filled = [b for b in range(15) if curve["count"][b]]
    inside = [np.ceil(probabilities.max(1) * 15) - 1 == b for b in filled]
    expected = [probabilities.max(1)[members].mean() for members in inside]
    np.testing.assert_allclose([curve["confidence"][b] for b in filled], expected, rtol=1e-5)


def test_temperature_is_cross_fitted():
    data = examples(997)
    logits, labels = data["logits"].astype(np.float64), data["label"]
    even = data["index"] % 2 == 0
    grid = calibration.TEMPERATURES

    def nll(chosen, temperature):
        return -log_softmax(logits[chosen] / temperature, 1)[np.arange(chosen.sum()), labels[chosen]]

    best = [grid[np.argmin([nll(half, t).mean() for t in grid])] for half in (even, ~even)]
    result = measure(ALL["calibrated"], data, 128)
    assert [result["temperature_even"], result["temperature_odd"]] == pytest.approx(best)
    crossed = np.where(even, best[1], best[0])
    assert result["nll"] == pytest.approx(np.r_[nll(even, best[1]), nll(~even, best[0])].mean(), rel=1e-5)
    assert result["ece"] == pytest.approx(ece(softmax(logits / crossed[:, None], 1), labels), abs=1e-6)
    assert result["nll"] < measure(ALL["nll"], data, 128)
    assert result["ece"] < measure(ALL["ece"], data, 128)


def test_temperature_of_opposite_halves_is_taken_from_the_other():
    """Even examples are always right, odd ones always wrong: fitted on itself each half would look well calibrated."""
    logits = np.tile(np.array([[4.0, 0.0]], np.float32), (64, 1))
    index = np.arange(64, dtype=np.int32)
    result = measure(ALL["calibrated"], {"logits": logits, "label": index % 2, "index": index}, 64)
    assert result["temperature_even"] == pytest.approx(0.1)
    assert result["temperature_odd"] == pytest.approx(10)
    assert result["nll"] > 10  # odd examples judged with the even half's certainty


def test_one_example_has_temperature_one():
    zero = np.zeros(1, np.int32)
    result = measure(ALL["calibrated"], {"logits": np.array([[1.0, 0.0]], np.float32), "label": zero, "index": zero}, 4)
    assert result["temperature_odd"] == 1.0
    assert result["nll"] == pytest.approx(np.log1p(np.exp(-1)), rel=1e-5)


def test_worst_mistakes_are_the_most_confident():
    data = examples(200)
    probabilities = softmax(data["logits"].astype(np.float64), 1)
    wrong = np.flatnonzero(probabilities.argmax(1) != data["label"])
    order = wrong[np.argsort(-probabilities[wrong].max(1))][:6]
    result = measure(ALL["worst"], data, 64)
    assert [row["index"] for row in result] == order.tolist()
    assert [row["predicted"] for row in result] == probabilities[order].argmax(1).tolist()
    np.testing.assert_allclose([row["confidence"] for row in result], probabilities[order].max(1), rtol=1e-5)


def test_no_mistakes_is_an_empty_list():
    four = np.arange(4, dtype=np.int32)
    data = {"logits": np.eye(4, dtype=np.float32), "label": four, "index": four}
    assert measure(metrics.worst_mistakes(3), data, 4) == []


def test_psnr_is_the_mean_over_images_in_decibels():
    random = np.random.default_rng(0)
    target = random.random((5, 8, 8, 3))
    noise = random.normal(size=(5, 8, 8, 3)) * np.array([0.01, 0.1, 0.2, 0.3, 9]).reshape(5, 1, 1, 1)
    metric = metrics.psnr(1.0, prediction="restored", target="image")
    batch = {"image": target.astype(np.float32), "valid": np.array([1, 1, 1, 1, 0], np.float32)}
    state = metric.update(metric.init(), {"restored": (target + noise).astype(np.float32)}, batch)
    expected = (-10 * np.log10((noise**2).mean((1, 2, 3))))[:4].mean()
    assert metric.finish(state) == pytest.approx(expected, rel=1e-5)


def test_equal_mistakes_are_ordered_by_index_in_any_order_of_merging():
    metric = metrics.worst_mistakes(3)
    logits, index = np.tile(np.float32([2, 0]), (6, 1)), np.arange(6, dtype=np.int32)
    parts = states(metric, {"logits": logits, "label": np.ones(6, np.int32), "index": index}, 2)
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        merged = metric.init()
        for place in order:
            merged = metric.merge(merged, parts[place])
        assert [row["index"] for row in metric.finish(jax.device_get(merged))] == [0, 1, 2]
