"""Options of models: what is impossible, and what nothing in a model takes, is refused in one line where it enters."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
import tiny_models
from flax import nnx

import models
from models.attention.registry import ATTENTION
from models.core.registry import _lookup

families = pytest.mark.parametrize("family", tiny_models.TINY)
mechanisms = pytest.mark.parametrize("name", ATTENTION)


def refused(call, *arguments, **options):
    """What a refusal says: one line (JAX appends a note of its own)."""
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    text = str(error.value).partition("\n-----")[0]
    assert "\n" not in text
    assert len(text) < 400
    return text


def create(name, **options):
    return nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))


def parameters(model):
    return {name.rpartition(".attn.")[2]: value.shape for name, value in models.split(model)[1].items()}


# --- names and values -------------------------------------------------------------------------------------------------


@families
def test_an_unknown_option_is_named_with_the_nearest(family):
    name, _ = tiny_models.TINY[family]
    said = refused(create, name, drop_pth=0.1)
    assert said.startswith(f"unknown option of model {name!r} 'drop_pth'; nearest: drop_path")


RATES = ("drop_path", "dropout", "attention_dropout", "head_dropout", "position_dropout")
COUNTS = (
    *("channels", "image_size", "width", "widths", "depth", "depths", "heads", "head_width", "mlp_width", "patch_size"),
    *("window", "grid_window", "stride", "strides", "block_size", "regions", "qk_widths", "pool_sizes", "pre_logits"),
    *("stem_width", "stem_widths", "stem_size", "downsample_size", "channel_version", "pool_mlp_width"),
)
SIZES = (
    *("num_classes", "registers", "features", "halo_size", "group_width", "local", "class_layers", "position_stage"),
    *("topk", "stem_plain"),
)
NUMBERS = ("mlp_ratio", "ratio", "norm_eps", "qk_ratio", "value_ratio")
FLAGS = ("scan", "qkv_bias", "class_token", "padding", "auto_pad", "dense", "block_attention", "feed_forward")
IMPOSSIBLE = {
    RATES: (1.0, 1, -0.1, float("nan"), "0.1", None, True),
    COUNTS: (0, -1, 1.5, float("nan"), "2", True, (0, 0), (2, 1.5)),
    SIZES: (-1, 0.5, float("nan"), "2", True),
    NUMBERS: (0, -1.0, float("nan"), "2", True),
    FLAGS: (1, 0, "yes", None),
}


@families
def test_impossible_values_are_refused(family):
    """Of every option of the class: the line begins with the option, and says what is allowed."""
    name, _ = tiny_models.TINY[family]
    known = _lookup(name)[0].Options(**models.variant(name))
    checked = 0
    for options, values in IMPOSSIBLE.items():
        for option in (option for option in options if hasattr(known, option)):
            for value in values:
                said = refused(dataclasses.replace, known, **{option: value})
                assert said.startswith(f"{option}={value!r}; allowed: "), (option, value)
            checked += len(values)
    assert checked > 60


def test_what_is_legal_is_not_refused():
    """Integers where a number is meant, numbers of NumPy, lists where there are several."""
    assert create("vit_mu16", layer_scale=1, head_bias=-10, norm_eps=1).options.layer_scale == 1
    assert create("vit_mu16", depth=jnp.int32(2).item(), drop_path=0).depth == 2
    assert create("nat_mini", depths=[1, 1, 1, 1], heads=[2, 4, 8, 16]).options.depths == (1, 1, 1, 1)
    assert create("vit_mu16", attention_options=None).depth == 1


def test_options_of_a_mechanism_that_are_no_options():
    for name, _ in tiny_models.TINY.values():
        for value in ((), "window", 3):
            said = refused(create, name, attention_options=value)
            assert said.startswith(f"attention_options={value!r}; allowed: a dictionary"), said


# --- what nothing takes -----------------------------------------------------------------------------------------------

WITH_NORMS = ("dense", "differential", "neighborhood", "window", "shifted_window", "grid")
TAKE = {
    "qk_norm": (True, WITH_NORMS),
    "scale_attention_norm": (True, WITH_NORMS),
    "qkv_bias": (False, tuple(name for name in ATTENTION if name != "convolution")),
    "attention_dropout": (0.1, tuple(name for name in ATTENTION if name not in ("convolution", "identity"))),
}
"""Option of a host that nobody but the mechanism takes -> (a value, the mechanisms that take it)."""


@mechanisms
def test_a_shared_option_is_taken_or_refused(name):
    """Of the isotropic host, which has all of them; taken, it is seen in the parameters."""
    fitting = {"halo": {"block_size": 2}, "bilevel_routing": {"regions": 2, "topk": 2}}.get(name)
    shared = {"attention": name, "attention_options": fitting, "class_token": False, "pool": "avg", "num_classes": 5}
    build = partial(create, "vit_mu16", image_size=32, patch_size=8, width=16, heads=2, mlp_width=32, **shared)
    plain = parameters(build())
    for option, (value, takers) in TAKE.items():
        if name not in takers:
            assert refused(build, **{option: value}).startswith(
                f"{option}={value!r} of model 'vit_mu16': attention {name} does not take it"
            )
            continue
        found = parameters(build(**{option: value}))
        assert (found != plain) == (option != "attention_dropout")
        if option == "attention_dropout":
            (block,) = build(scan=False, **{option: value}).blocks.blocks
            assert block.attn.dropout == value


OF_ANOTHER = [
    ("swin_tiny", {"attention": "dense", "window": 4}),
    ("swin_tiny", {"attention": "channel", "shrink_windows": False}),
    ("swin_tiny", {"attention": "dense", "head_width": 16}),
    ("nat_mini", {"attention": "outlook", "window": 5}),
    ("nat_mini", {"attention": "window", "dilations": "largest", "window": 5}),
    ("nat_iso_s", {"attention": "dense", "dilation": 2}),
    ("vitrpb_s", {"window": 5}),
    ("davit_tiny", {"attention": "window", "channel_version": 2}),
    ("davit_tiny", {"attention": "channel", "window": 5}),
    ("maxvit_tiny", {"attention": "dense", "grid_window": 5}),
    ("volo_d1", {"attention": "dense", "window": 5}),
    ("volo_d1", {"attention": "dense", "stride": 1}),
    ("biformer_tiny", {"attention": "dense", "regions": 4}),
    ("biformer_tiny", {"attention": "bilevel_routing", "topk": (1, 1, 1, 1), "local_of": "values"}),
    ("halonet26t", {"attention": "dense", "block_size": 4}),
    ("halonet26t", {"attention": "window", "qk_ratio": 0.5}),
]


@pytest.mark.parametrize(("name", "options"), OF_ANOTHER)
def test_an_option_of_another_mechanism_is_refused(name, options):
    said = refused(create, name, **options)
    option = said.partition("=")[0]
    assert option in options
    assert said.startswith(f"{option}={options[option]!r} of model {name!r}: it is for attention ")
    assert said.endswith(" takes goes into attention_options")


# --- what hosts say to mechanisms -------------------------------------------------------------------------------------


def count(model):
    return sum(math.prod(value.shape) for value in models.split(model)[1].values())


def test_windows_of_a_host_are_for_mechanisms_that_mean_the_same():
    """Outlook attention has weights for a window's pairs: 7 x 7 places would be 2401 for each head."""
    sizes = {name: count(create("nat_mini", attention=name)) for name in ("neighborhood", "outlook")}
    assert sizes["outlook"] < 1.3 * sizes["neighborhood"]
    model = create("nat_mini", attention="outlook", scan=False)
    assert getattr(model.stages[0].blocks, "0").attn.window == 3


def test_windows_of_the_user_are_shifted_by_half():
    model = create("swin_tiny", attention_options={"window": 4}, scan=False)
    layers = [getattr(model.stages[0].blocks, str(layer)).attn for layer in (0, 1)]
    assert [layer.window for layer in layers] == [(4, 4), (4, 4)]
    assert [layer.shift for layer in layers] == [(0, 0), (2, 2)]


# --- every mechanism in every family ----------------------------------------------------------------------------------

NEEDS_OPTIONS = ("bilevel_routing", "halo")
"""What no tiny model has a map for by itself, but for that of its own family."""
WITHOUT_PREFIX = tuple(
    name for name in ATTENTION if name not in ("channel", "dense", "differential", "identity", "neighborhood")
)


@families
def test_every_mechanism_runs_or_is_refused_in_one_line(family):
    """With its own options as they are, and with ones for maps of 4 and 8 places."""
    side = tiny_models.TINY[family][1]["image_size"]
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    fitting = {"bilevel_routing": {"regions": 2, "topk": 2}, "halo": {"block_size": 2, "halo_size": 1}}
    own = {"depths": (1, 1)} if family == "maxvit" else {}
    for name in ATTENTION:
        for options in (None, *([fitting[name]] if name in fitting else [])):
            given = dict(own if options is None else own | {"attention_options": options})
            if family == "biformer" and name == "bilevel_routing":
                given |= {"topk": (2, 2)}
            refuses = (name in WITHOUT_PREFIX) if family == "vit" else (name in NEEDS_OPTIONS and options is None)
            if refuses and (family, name) not in (("halonet", "halo"), ("biformer", "bilevel_routing")):
                said = refused(tiny_models.abstract, family, attention=name, **given)
                assert said.startswith(f"attention {name!r} does not fit here: ")
                continue
            graph, params, state = models.split(tiny_models.abstract(family, attention=name, **given))
            run = jax.eval_shape(lambda p, s, x, g=graph: models.merge(g, p, s)(x), params, state, images)
            assert run.shape == (2, 5), name
