"""Attention maps on the grid of the image: for every family what a head gives is its values, weighed by the map.

That is the definition of attention between places; it knows of no windows, blocks, regions or paddings.
"""

import functools
import math

import jax
import numpy as np
import pytest
import tiny_models

import models
from attn import Grid
from models.core.attention_map import attentions, folded
from models.hosts.host import _compiled

CASES = {
    # Family, options, layer, the place that looks, and the windows that hold it where a head gives their sum.
    "vit": ("vit", {}, 1, (1, 2), 1),
    "differential, registers": ("vit", {"attention": "differential", "registers": 2}, 0, (3, 0), 1),
    "nat": ("nat", {}, 1, (0, 5), 1),
    "nat_isotropic": ("nat_isotropic", {}, 1, (2, 3), 1),
    "swin": ("swin", {}, 0, (5, 2), 1),
    "swin, shifted": ("swin", {}, 1, (7, 1), 1),
    "swin, shifted and padded": ("swin", {"image_size": 40}, 1, (9, 0), 1),
    "maxvit, windows": ("maxvit", {}, "stages.0.first.attn_block", (4, 3), 1),
    "maxvit, grid": ("maxvit", {}, 0, (4, 3), 1),
    "davit, padded": ("davit", {}, 0, (7, 6), 1),
    "biformer, routed": ("biformer", {}, 0, (6, 1), 1),
    "halonet, every other place": ("halonet", {}, "stages.1.first", (2, 3), 1),
    "volo, outlook": ("volo", {}, 1, (1, 3), 4),
    "volo, class": ("volo", {}, None, None, 1),
    "pooled by attention": ("vit", {"class_token": False, "pool": "map"}, None, None, 1),
}
cases = pytest.mark.parametrize("case", CASES)


@functools.cache
def model(family, scan=False, **options):
    """Unrolled, so that of a program only the layers up to the one that is asked for are compiled."""
    with jax.ensure_compile_time_eval():
        return tiny_models.create(family, scan=scan, **options)


def images(side=32):
    return tiny_models.images(side, side)


@functools.cache
def looked(case):
    """The map of a case, and what is recorded beside it: values and heads of that attention."""
    family, options, layer, query, _ = CASES[case]
    made, told = model(family, **options), {}

    @jax.jit
    def run(images):
        one = models.attention_map(made, images, layer=layer, query=query)
        (about,) = (about for about in attentions(made, images) if about.name == one.layer)
        tap = models.record("v", "heads", layers=[about.layer], at=about.path)
        made(images, tap=tap)
        told["about"] = about
        values = tap.values
        return one.values, one.prefix, one.outside, values["v"][0], values["heads"][0]

    found = run(images(options.get("image_size", 32)))
    return *map(np.asarray, found), told["about"]


def rows_of(tokens, grid, shift=0):
    """Which rows of an axis of tokens are those of the grid: the map may have been padded behind it, after a shift."""
    side = math.isqrt(tokens - grid.prefix)
    lines = [(np.arange(own) - shift) % own for own in grid.shape]
    lines = [(line + shift) % side for line in lines]
    places = grid.prefix + lines[0][:, None] * side + lines[1][None]
    return np.concatenate([np.arange(grid.prefix), places.reshape(-1)])


@cases
def test_a_head_is_its_values_weighed_by_the_map(case):
    _, _, _, query, times = CASES[case]
    values, prefix, outside, v, heads, about = looked(case)
    shares = np.concatenate([prefix, values.reshape(*values.shape[:2], -1)], -1)
    assert shares.min() >= 0
    np.testing.assert_allclose(shares.sum(-1) + outside, 1, atol=1e-5)
    assert Grid(values.shape[2:], prefix.shape[-1]) == about.keys

    shift = 2 if "shifted" in case else 0
    rows = rows_of(v.shape[1], about.keys, shift)
    padding = np.delete(v, rows, axis=1)
    # Places that a map was padded by have all the same values; those outside of it have none.
    beyond = padding[:, 0] if padding.size else np.zeros_like(v[:, 0])
    expected = np.einsum("bhm,bmhe->bhe", shares, v[:, rows]) + outside[..., None] * beyond
    if query is None:
        row = 0
    else:
        token = about.queries.prefix + np.ravel_multi_index(query, about.queries.shape)
        row = rows_of(heads.shape[1], about.queries, shift)[token]
    np.testing.assert_allclose(heads[:, row], times * expected, atol=2e-5 * np.abs(heads).max())
    assert np.abs(values - values.mean((2, 3), keepdims=True)).max() > 1e-4


@pytest.mark.parametrize("case", ["swin, shifted", "davit, padded"])
def test_a_scanned_model_gives_the_same(case):
    """Also where two layers of one scan have other windows, and where every other one is no map over places."""
    family, options, layer, query, _ = CASES[case]
    scanned = model(family, scan=True, **options)
    run = jax.jit(lambda images: models.attention_map(scanned, images, layer=layer, query=query).values)
    np.testing.assert_allclose(run(images()), looked(case)[0], atol=1e-5)


def test_what_a_user_asks_for():
    """One image or several; one head, each, or their mean; the class token, a place, or all."""
    made, tap = model("vit", scan=True), models.record("probs", layers=2)
    made(images(), tap=tap)
    probs = np.asarray(tap["probs"][0])
    compiled = _compiled._cache_size()

    def same(one, expected):
        np.testing.assert_allclose(one.values, expected[..., 1:].reshape(one.values.shape), atol=1e-6)
        np.testing.assert_allclose(one.prefix, expected[..., :1], atol=1e-6)

    one = models.attention_map(made, images())
    assert (one.layer, one.heads, one.query, one.queries) == ("blocks.2.attn", (0, 1), "cls", Grid((4, 4), 1))
    assert one.values.shape == (2, 2, 4, 4)
    same(one, probs[:, :, 0])
    same(models.attention_map(made, images(), layer=-1, head=1, query="cls"), probs[:, 1:, 0])
    same(models.attention_map(made, images(), layer="blocks.2", head="mean"), probs[:, :, 0].mean(1, keepdims=True))
    same(models.attention_map(made, images(), query=(2, 3)), probs[:, :, 1 + 2 * 4 + 3])
    same(models.attention_map(made, images(), query="mean"), probs[:, :, 1:].mean(2))
    assert _compiled._cache_size() == compiled + 1, "every query is compiled anew"
    single = models.attention_map(made, np.asarray(images()[1]), query=(2, 3))
    assert single.outside.shape == (2,)
    same(single, probs[1, :, 1 + 2 * 4 + 3])


MISTAKES = {
    ("vit", "layer", 3): "layer=3 of a VisionTransformer; allowed: 0 to 2, or from the end -1 to -3; "
    "as names allowed: blocks.[0:3].attn",
    ("vit", "layer", True): "layer=True of a VisionTransformer",
    ("vit", "layer", "block.2"): "unknown layer 'block.2' (nearest: blocks.2); allowed: blocks.[0:3].attn",
    ("vit", "head", 2): "head=2 of blocks.2.attn; allowed: 0 to 1, 'mean', None for each",
    ("vit", "head", "men"): "head='men' of blocks.2.attn; allowed: 0 to 1, 'mean', None for each",
    ("vit", "query", (4, 0)): "query=(4, 0) of blocks.2.attn; allowed: 'cls', 'mean', "
    "a place (row, column) from (0, 0) to (3, 3)",
    ("vit", "query", "clas"): "query='clas' of blocks.2.attn (nearest: cls); allowed: 'cls', 'mean', "
    "a place (row, column) from (0, 0) to (3, 3)",
    ("volo", "query", (0, 0)): "query=(0, 0) of class_blocks.1.attn; allowed: 'cls'",
    ("swin", "query", "cls"): "query='cls' of stages.1.blocks.1.attn; allowed: 'mean', "
    "a place (row, column) from (0, 0) to (3, 3)",
    ("davit", "layer", -1): "layer -1 has no map over places: it has maps of channels for channels, which "
    "models.record('probs', layers=[5]) gives; allowed: stages.0.blocks.0.attn, stages.1.blocks.[0:3:2].attn",
    ("halonet", "layer", 0): "layer 0 has no map over places: it has no attention; allowed: stages.1.first.attn, "
    "stages.1.blocks.1.attn",
}


@pytest.mark.parametrize(("family", "argument", "value"), MISTAKES)
def test_a_mistake_is_told_in_one_line(family, argument, value):
    with pytest.raises(ValueError) as error:
        models.attention_map(model(family, scan=True), images(), **{argument: value})
    assert str(error.value).startswith(MISTAKES[family, argument, value])
    assert "\n" not in str(error.value)


def test_models_and_images_of_other_kinds():
    bare = model("vit", attention="convolution", class_token=False, pool="avg")
    with pytest.raises(ValueError, match="a VisionTransformer has no attention with a map over places: it has no"):
        models.attention_map(bare, images())
    with pytest.raises(ValueError, match="images are uint8: normalize them"):
        models.attention_map(model("vit", scan=True), np.zeros((32, 32, 3), np.uint8))


def test_names_that_differ_in_a_number_are_told_as_one():
    names = ["blocks.0.attn", "blocks.1.attn", "stages.1.first.attn", *(f"stages.2.blocks.{n}.attn" for n in (0, 2, 4))]
    assert folded(names) == ["blocks.[0:2].attn", "stages.1.first.attn", "stages.2.blocks.[0:5:2].attn"]
    assert folded(["attn_pool", "blocks.3.attn", "b.0.a", "b.1.a", "b.5.a"]) == [
        "attn_pool",
        "blocks.3.attn",
        "b.[0,1,5].a",
    ]


# --- rollout ----------------------------------------------------------------------------------------------------------


def test_a_rollout_of_one_layer_is_half_its_map():
    """Of a shifted one, whose windows are others than those of the layer before."""
    made = model("swin")

    @jax.jit
    def run(images):
        one = models.attention_rollout(made, images, layers=[1], query=(7, 1))
        return one.values, models.attention_map(made, images, layer=1, query=(7, 1), head="mean").values

    rolled, expected = map(np.array, run(images()))
    expected = 0.5 * expected
    expected[:, :, 7, 1] += 0.5
    np.testing.assert_allclose(rolled, expected, atol=1e-6)


@pytest.mark.parametrize("family", ["davit", "biformer", "volo"])
def test_a_rollout_goes_through_every_map_over_places(family):
    """Channels for channels are left out; regions that depend on the image, and class attention, are not."""
    made = model(family, scan=True)
    one = models.attention_rollout(made, images())
    assert one.values.shape == (2, 1, 8, 8), "of the first map"
    assert one.query == ("cls" if family == "volo" else "mean")
    np.testing.assert_allclose(one.values.sum((1, 2, 3)), 1, atol=1e-5)
    assert np.abs(one.values[0] - one.values[1]).max() > 1e-4
    with pytest.raises(ValueError, match="residual=2: the share of the residual branch; allowed: 0 to 1"):
        models.attention_rollout(made, images(), residual=2)


# --- pictures ---------------------------------------------------------------------------------------------------------


def an_attention_map(heads, query="cls", batch=None):
    values = np.random.default_rng(0).uniform(size=(*([batch] if batch else []), heads, 4, 6)).astype(np.float32)
    lead = values.shape[:-2]
    about = ("blocks.2.attn", tuple(range(heads)), query, Grid((4, 6), 1))
    return models.AttentionMap(values / 30, np.zeros((*lead, 1)), np.zeros(lead), *about)


def test_a_picture_has_a_panel_for_each_head_over_the_image():
    picture = an_attention_map(8, query=(1, 2)).plot(np.zeros((16, 24, 3)))
    shown = [axes for axes in picture.axes if axes.images]
    assert len(shown) == 9
    assert all(axes.images[0].get_array().shape[:2] == (16, 24) for axes in shown)
    (frame,) = shown[1].patches
    assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (7.5, 3.5, 4, 4)
    assert "head 0" in shown[1].get_title()
    assert "place (1, 2)" in picture.get_suptitle()
    assert picture._repr_png_()[:4] == b"\x89PNG"
    alone = [axes for axes in an_attention_map(2, batch=3).plot().axes if axes.images]
    assert len(alone) == 6
    assert not any(axes.patches for axes in alone)


def test_normalized_images_are_stretched_and_others_refused():
    one = an_attention_map(1)
    ramp = np.linspace(-2, 2, 16 * 24).reshape(16, 24, 1)
    shown = one.plot(ramp).axes[0].images[0].get_array()
    assert (shown.min(), shown.max()) == (0, 1)
    plain = one.plot(ramp / 8 + 0.5).axes[0].images[0].get_array()
    np.testing.assert_allclose(plain, ramp[..., 0] / 8 + 0.5, rtol=1e-6)
    with pytest.raises(ValueError, match=r"images of \(2, 4, 4, 3\) for 1 map; allowed: as many images"):
        one.plot(np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="alpha=3"):
        one.plot(ramp, alpha=3)


# --- what taps say of recorded maps -----------------------------------------------------------------------------------


def test_recorded_maps_of_shifted_windows_know_their_tokens():
    made, tap = model("swin", scan=True), models.record("probs", at="stages.0*")
    made(images(), tap=tap)
    over = tap.values.to_tokens("probs", queries=[7 * 8 + 1])
    np.testing.assert_allclose(over[1, :, :, 0].reshape(2, 2, 8, 8), looked("swin, shifted")[0], atol=1e-5)
    with pytest.raises(ValueError, match="has maps over other tokens in some layers: values"):
        tap.values.about["stages.0.blocks.attn.probs"].to_tokens(tap["probs"][1])
    with pytest.raises(KeyError, match="stands for 0 of what was recorded"):
        tap.values.to_tokens("prob")


def test_layers_with_unlike_maps_are_recorded_apart():
    made, tap = model("davit"), models.record("probs", at="stages.1*")
    with pytest.raises(
        ValueError, match=r"several shapes: .* in layers=\[2, 4\], .* in layers=\[3, 5\]; record them apart"
    ):
        jax.eval_shape(lambda images: made(images, tap=tap), images())
    regions = models.record("probs", layers=0)
    jax.eval_shape(lambda images: model("biformer")(images, tap=regions), images())
    with pytest.raises(ValueError, match="has keys that depend on the images"):
        regions.values.about["stages.0.blocks.attn.probs"].to_tokens(np.zeros(1))
