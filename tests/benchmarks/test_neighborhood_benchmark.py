"""The peers of the TPU benchmark compute what ours computes, and their figures are kept as they should be."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import neighborhood_sides, neighborhood_tpu
from benchmarks.neighborhood_tpu import CASES, DINAT, Case
from benchmarks.pages import markdown, write_between
from kernels.neighborhood.pattern import make_pattern


def explicit(q, k, v, pattern, heads):
    """Softmax over the keys of each query, one query after another, float64."""
    width = q.shape[-1]
    q, k, v = (np.asarray(x, np.float64).reshape(pattern.tokens, heads, -1) for x in (q, k, v))
    out = np.zeros((pattern.tokens, heads, v.shape[-1]))
    for query, where in enumerate(np.ndindex(*pattern.shape)):
        keys = pattern.neighbors(where)
        for head in range(heads):
            weights = np.exp(k[keys, head] @ q[query, head])
            out[query, head] = weights @ v[keys, head] / weights.sum()
    return out.reshape(1, *pattern.shape, width)


def inputs(shape, width):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, *shape, width)) for key in keys]


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize(("shape", "window", "dilation"), [((6, 8), 3, 2), ((7, 7), 7, 1), ((12,), 5, 2)])
def test_dense_attention_is_neighborhood_attention(shape, window, dilation, heads_first):
    q, k, v = inputs(shape, 12)
    (out,) = neighborhood_sides.dense(q, k, v, heads=3, window=window, dilation=dilation, heads_first=heads_first)
    pattern = make_pattern(shape, window, dilation=dilation)
    np.testing.assert_allclose(out, explicit(q, k, v, pattern, 3), rtol=1e-4, atol=1e-5)


def test_a_cotangent_gives_gradients():
    q, k, v = inputs((4, 4), 8)
    out, *gradients = neighborhood_sides.dense(
        q, k, v, jnp.ones_like(q), heads=2, window=3, dilation=1, heads_first=True
    )
    assert out.shape == q.shape
    assert [one.shape for one in gradients] == [q.shape] * 3
    # The weights of a query add up to one, and each value is seen as often as its weights say.
    np.testing.assert_allclose(gradients[2].sum(), v.size, rtol=1e-5)


@pytest.mark.parametrize(("shape", "dilation"), [((8, 8), 2), ((6, 12), 3), ((16,), 4), ((4, 4, 6), 2)])
def test_splash_by_group_has_the_mask_of_its_order(shape, dilation):
    pattern = make_pattern(shape, 2, dilation=dilation)
    tokens = jnp.arange(pattern.tokens).reshape(1, *shape, 1)
    sorted_tokens = neighborhood_sides._into_groups(tokens, dilation)
    np.testing.assert_array_equal(neighborhood_sides._out_of_groups(sorted_tokens, dilation), tokens)
    order = np.asarray(sorted_tokens).ravel()
    mask = neighborhood_sides._grouped_mask(pattern)
    for query in (0, 5, pattern.tokens - 1):
        keys = pattern.neighbors(np.unravel_index(order[query], shape))
        assert set(order[mask[query]]) == set(keys)
    size = pattern.tokens // dilation ** len(shape)
    first = mask[:size]
    assert first[:, :size].any(axis=1).all()
    assert not first[:, size:].any()


def test_every_option_of_splash_has_a_label_of_its_own():
    for case in (*CASES, *DINAT):
        options = list(neighborhood_tpu.splash_options(case))
        labels = {neighborhood_tpu._label(one) for one in options}
        assert len(labels) == len(options)
        assert bool(options) == (case.batch == 1)
        assert any("group" in label for label in labels) == (case.dilation > 1 and case.batch == 1)


def test_figures_of_peers_are_kept(tmp_path, monkeypatch):
    pytest.importorskip("libtpu")  # figures are kept by its version
    asked = []

    def measure(self, side, chip, **options):
        asked.append(side)
        return {"figure": float(len(asked))}

    monkeypatch.setattr(neighborhood_tpu, "PEERS", tmp_path)
    monkeypatch.setattr(Case, "measure", measure)
    case = DINAT[0]
    with pytest.raises(KeyError, match=r"128/128 is not in mine.json for jax .*; measure it with --peers"):
        neighborhood_tpu.peers(case, "mine", measure=False, refresh=False)
    first = neighborhood_tpu.peers(case, "mine", measure=True, refresh=False)
    assert len(first) == len(asked) > 3
    assert neighborhood_tpu.peers(case, "mine", measure=False, refresh=False) == first
    assert neighborhood_tpu.peers(case, "mine", measure=True, refresh=True) != first
    kept = json.loads((tmp_path / "mine.json").read_text())
    assert list(kept) == [neighborhood_tpu.versions()]


def test_least_bytes_and_products():
    case = Case((64, 64), 7, 64)
    assert case.least_bytes == 4 * 4096 * 256 * 2
    assert case.products == 2 * 2 * 4096 * 49 * 64 * 4
    assert Case((64, 64), 7, 64, backward=True).least_bytes == 3 * case.least_bytes


def test_a_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "kernels.md"
    page.write_text("before\n<!-- one: begin -->\nold\n<!-- one: end -->\nafter\n")
    write_between(page, "one", markdown([{"a": "1", "b": ""}]))
    assert page.read_text() == "before\n<!-- one: begin -->\n| a | b |\n|---|---|\n| 1 |  |\n<!-- one: end -->\nafter\n"
    with pytest.raises(ValueError, match="no mark <!-- two: begin -->"):
        write_between(page, "two", "")
