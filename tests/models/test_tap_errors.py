"""What a tap may ask for and answer, and the line that is said of anything else; what it is told of a site."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

import models
from models.core.errors import unknown_name
from models.core.tap import SITES


@functools.cache
def shapes(family, **options):
    return models.split(tiny_models.abstract(family, **options))


def traced(tap, family="vit", method="__call__", **options):
    """A call of a model, as shapes."""
    graph, params, state = shapes(family, **options)
    side = tiny_models.TINY[family][1]["image_size"]
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    return jax.eval_shape(lambda p, s, x: getattr(models.merge(graph, p, s), method)(x, tap=tap), params, state, images)


def refused(tap, **options):
    with pytest.raises(ValueError) as error:
        traced(tap, **options)
    text = str(error.value).partition("\n-----")[0]
    assert "\n" not in text
    return text


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_misspelt_site_is_named_with_the_nearest():
    for tap in (models.record("prob"), models.tap("prob")(lambda site, value: value)):
        assert refused(tap) == unknown_name("site", "prob", SITES)
        assert "nearest: probs" in refused(tap)


def test_a_site_that_this_model_has_not():
    """With those that it has; also at a path, and in a layer."""
    assert refused(models.record("routes")).startswith(
        "no site 'routes' was reached; this model has embedded, block.in"
    )
    said = refused(models.record("probs", at="*.attn_gird.attn"), family="maxvit")
    assert said.startswith("no site 'probs' at '*.attn_gird.attn' was reached")
    assert "attn_grid.attn" in said
    assert refused(models.record("heads", layers=0), family="halonet").startswith("no site 'heads' of layers [0]")


@pytest.mark.parametrize("family", ["vit", "halonet"])
def test_layers_count_from_the_end_too(family):
    depth = tiny_models.abstract(family).depth
    for scan in (True, False):
        last, same = models.record("block.out", layers=-1), models.record("block.out", layers=[depth - 1])
        traced(last | same, family, scan=scan)
        assert [*last.values.layers.values()] == [*same.values.layers.values()] == [(depth - 1,)]
    for layer in (depth + 1, -depth - 1):
        said = refused(models.steer(layer, jnp.zeros(4)), family=family)
        assert said == f"layer {layer} of a tap; allowed: 0 to {depth - 1}, or from the end -1 to -{depth}"


@pytest.mark.parametrize("what", [3, "probs", ("probs",), np.ones(3), lambda site, value: value])
def test_what_is_no_tap(what):
    assert "a tap is callable as tap(site, value) and says by `sites` which it wants" in refused(what)


# --- what is answered -------------------------------------------------------------------------------------------------


def answering(answer, *sites, **options):
    return models.tap(*(sites or ("heads",)), **options)(lambda site, value: answer(value))


def test_an_answer_is_checked():
    for layers in (None, [0]):
        none = refused(answering(lambda value: None, layers=layers))
        assert none == "a tap gave None for site blocks.attn.heads: it has to return the value to go on with"
    for wrong in (lambda x: x[..., :1], lambda x: x[None], lambda x: x.sum(), lambda x: x[:, :3]):
        assert "for site blocks.attn.heads, which is [2, " in refused(answering(wrong))


@pytest.mark.parametrize("family", ["vit", "swin", "nat", "halonet"])
def test_an_answer_goes_on_in_the_dtype_of_the_site(family):
    """A tap may compute in another one."""
    wide = answering(lambda value: value.astype(jnp.float16), "block.out", "heads", "probs")
    for dtype in (None, jnp.bfloat16):
        assert traced(wide, family, dtype=dtype).dtype == jnp.float32


def test_keys_may_be_more_and_nothing_else():
    fewer = answering(lambda value: value[:, :4], "q")
    assert refused(fewer).startswith("a tap gave [2, 4, ")
    assert "axes that may change: keys" in refused(answering(lambda value: value[:, :, :1], "k"))


# --- what a tap is told -----------------------------------------------------------------------------------------------


def told(family, *sites, **options):
    found = []

    @models.tap(*sites)
    def look(site, value):
        assert len(site.axes) == value.ndim
        found.append(site)
        return value

    traced(look, family, **options)
    return found


@pytest.mark.parametrize("family", tiny_models.TINY)
def test_a_layer_is_a_number_and_a_path_tells_attentions_apart(family):
    """Of an unrolled model each layer is met by itself, and no two sites of one are the same."""
    depth = tiny_models.abstract(family).depth
    sites = told(family, "attn.in", "block.in", "block.out", "mlp.in", scan=False)
    assert {site.layer for site in sites} == {*range(depth)}
    assert all(site.span == (site.layer,) for site in sites)
    names = [(site.layer, site.full) for site in sites]
    assert len(set(names)) == len(names)
    scanned = told(family, "attn.in", "block.in", "block.out", "mlp.in")
    assert {(layer, site.full) for site in scanned for layer in site.span} == set(names)


@pytest.mark.parametrize("family", tiny_models.TINY)
def test_maps_say_which_tokens_they_are_for(family):
    """Every family, one word for one axis; probabilities go back to pairs of tokens of the map."""
    for site in told(family, "logits", "probs", scan=False):
        assert site.axes[0] == "batch"
        assert site.axes[-2:] in (("queries", "keys"), ("dim", "dim"), ("channels", "channels"))
        if site.index is not None:
            assert site.index.grids[1].tokens >= site.grid.tokens


def test_a_record_is_a_mapping():
    tap = models.record("heads", "block.out", layers=[0, -1])
    with pytest.raises(ValueError, match="nothing is recorded yet"):
        tap["heads"]
    traced(tap)
    assert list(tap) == ["blocks.attn.heads", "blocks.block.out"] or set(tap) == {
        "blocks.attn.heads",
        "blocks.block.out",
    }
    assert dict(tap).keys() == {*tap.keys()} == {name for name, _ in tap.items()}
    assert len(tap.values) == 2
    with pytest.raises(KeyError, match=r"nothing was recorded of 'head'; there is blocks\.attn\.heads"):
        tap["head"]
