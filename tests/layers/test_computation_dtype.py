"""What layers compute in: float32 unless said otherwise, whatever they are given; sums and means in float32 always."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

import models
from attn import Grid
from attn.outlook.api import outlook_centres
from models.attention.class_attention import ClassAttention
from models.attention.registry import ATTENTION, make_attention
from models.core.call import Call
from models.layers.conv import Conv
from models.layers.conv_norm import ConvNorm
from models.layers.downsample import (
    ConvDownsample,
    NormedConvDownsample,
    NormedDownsample,
    NormFirstDownsample,
    PatchMerging,
)
from models.layers.gate import EfficientChannelAttention, SqueezeExcite
from models.layers.linear import Head, Linear, computed
from models.layers.mbconv import MBConv
from models.layers.mlp import DepthwiseMlp, GatedMlp, Mlp
from models.layers.norm import BatchNorm, LayerNorm, RMSNorm
from models.layers.patch import MapPatches, PatchEmbed
from models.layers.pool import GLOBAL_POOLS, AttentionPool, half, pool_half
from models.layers.position import ConvPosition
from models.layers.stem import ConvStem, HaloStem, NormedConvStem, NormedPatchStem, OverlappingStem, PatchStem, VoloStem

NORMAL = jax.nn.initializers.normal(1.0)
START = {"init": "timm"}
GRID = {"grid": Grid((8, 8))}
CALL = {"call": Call(Grid((8, 8)))}
TRAIN = {"train": True}

# How each is made of (dtype, rngs), the shape it is given, and what it is called with.
ON_MAPS = (2, 8, 8, 16)
ON_TOKENS = (2, 64, 16)
LAYERS = {
    "linear": (partial(Linear, 16, 8, kernel_init=NORMAL), ON_TOKENS, {}),
    "classifier": (partial(Head, 16, 8, kernel_init=NORMAL), ON_TOKENS, {}),
    "layer norm": (lambda dtype, rngs: LayerNorm(16, dtype=dtype), ON_TOKENS, {}),
    "rms norm": (lambda dtype, rngs: RMSNorm(16, dtype=dtype), ON_TOKENS, {}),
    "batch norm": (lambda dtype, rngs: BatchNorm(16, dtype=dtype), ON_MAPS, {}),
    "batch norm in training": (lambda dtype, rngs: BatchNorm(16, dtype=dtype), ON_MAPS, TRAIN),
    "convolution": (partial(Conv, 16, 8, size=3, kernel_init=NORMAL), ON_MAPS, {}),
    "depthwise convolution": (partial(Conv, 16, 16, size=3, groups=16, kernel_init=NORMAL), ON_MAPS, {}),
    "convolution and norm": (partial(ConvNorm, 16, 8, size=3, activation="relu"), ON_MAPS, TRAIN),
    "squeeze excite": (partial(SqueezeExcite, 16, 4, activation="relu"), ON_MAPS, {}),
    "gate of channels": (partial(EfficientChannelAttention, 16), ON_MAPS, {}),
    "mlp": (partial(Mlp, 16, 32, activation="gelu", dropout=0.0, scale_norm=1e-6, **START), ON_TOKENS, CALL),
    "gated mlp": (partial(GatedMlp, 16, 32, activation="gelu", dropout=0.0, **START), ON_TOKENS, CALL),
    "depthwise mlp": (partial(DepthwiseMlp, 16, 32, activation="gelu", **START), ON_TOKENS, CALL),
    "mbconv": (partial(MBConv, 16, 16), ON_MAPS, {}),
    "strided mbconv": (partial(MBConv, 16, 8, stride=2), ON_MAPS, TRAIN),
    "patches": (partial(PatchEmbed, (4, 4), 16, 8, kernel_init=NORMAL), ON_MAPS, {}),
    "patches of a map": (partial(MapPatches, (4, 4), 16, 8, kernel_init=NORMAL), ON_MAPS, {}),
    "position": (partial(ConvPosition, 16, activation=None, **START), ON_TOKENS, GRID),
    "attention pool": (
        partial(AttentionPool, 16, 2, mlp_width=32, activation="gelu", norm_eps=1e-6),
        ON_TOKENS,
        CALL,
    ),
    "class attention": (partial(ClassAttention, 16, 2, **START), ON_TOKENS, {"call": Call(Grid((9, 7), prefix=1))}),
    **{
        kind.__name__: (partial(kind, 16, 8, norm_eps=1e-6, **START), ON_MAPS, {})
        for kind in (ConvDownsample, PatchMerging, OverlappingStem)
    },
    **{
        kind.__name__: (partial(kind, 16, 8, norm="batch", **START), ON_MAPS, TRAIN)
        for kind in (NormedConvDownsample, NormFirstDownsample, NormedConvStem, NormedPatchStem)
    },
    "NormedDownsample": (partial(NormedDownsample, 16, 8, size=3, norm_eps=1e-6, **START), ON_MAPS, {}),
    "ConvStem": (partial(ConvStem, 16, 8, norm=True, norm_eps=1e-6, **START), ON_MAPS, {}),
    "PatchStem": (partial(PatchStem, 16, 8, norm=False, norm_eps=1e-6, **START), ON_MAPS, {}),
    "VoloStem": (partial(VoloStem, 16, 8, hidden=8, patch=4, **START), ON_MAPS, {}),
    "HaloStem": (partial(HaloStem, 16, (8, 8), activation="relu"), ON_MAPS, {}),
}
FITTED = {"halo": {"block_size": 2}, "bottleneck": {"shape": (8, 8)}, "bilevel_routing": {"regions": 2, "topk": 2}}
for _name in ATTENTION:
    _made = partial(make_attention, _name, 16, 2, options=FITTED.get(_name))
    LAYERS[f"{_name} attention"] = (
        lambda dtype, rngs, made=_made: made(shared={"dtype": dtype}, rngs=rngs),
        ON_TOKENS,
        CALL,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_none_is_float32_whatever_comes_in(name):
    """The numbers of a float32 layer on what the input is in float32, for parameters of which none is small."""
    make, shape, options = LAYERS[name]
    x = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    outputs = []
    for dtype, given in ((None, x), (jnp.float32, x.astype(jnp.float32))):
        graph, params, state = models.split(make(dtype=dtype, rngs=nnx.Rngs(0)))
        layer = models.merge(graph, tiny_models.numbers(params), tiny_models.numbers(state))
        outputs.append(layer(given, **options))
    assert outputs[0].dtype == jnp.float32
    np.testing.assert_allclose(*outputs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_is_computed_in_whatever_comes_in(name):
    make, shape, options = LAYERS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    layer = make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    found = jax.eval_shape(lambda x: layer(x, **{**options, "train": False} if "train" in options else options), x)
    # A position is added to tokens, which keep their own.
    own = jnp.float32 if name in ("classifier", "position") else jnp.bfloat16
    assert found.dtype == own


@pytest.mark.parametrize("dtype", ["int32", jnp.uint8, bool, "bfloat61", complex])
def test_other_dtypes_are_one_line(dtype):
    with pytest.raises(
        ValueError, match=r"dtype=.* of a computation; allowed: floating point, None is float32"
    ) as error:
        Linear(2, 3, kernel_init=NORMAL, dtype=dtype, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)
    assert computed("bfloat16") == computed(jnp.bfloat16) == jnp.bfloat16


def test_other_channels_are_one_line():
    """One channel, which a norm would repeat, among them."""
    for name in (
        "linear",
        "layer norm",
        "rms norm",
        "batch norm",
        "mlp",
        "PatchMerging",
        "PatchStem",
        "NormedDownsample",
    ):
        make, shape, options = LAYERS[name]
        for channels in (1, 15):
            with pytest.raises(ValueError, match=rf"is given \(.*{channels}\); allowed: ") as error:
                make(dtype=None, rngs=nnx.Rngs(0))(jnp.ones((*shape[:-1], channels)), **options)
            assert "\n" not in str(error.value)


# --- sums and means ---------------------------------------------------------------------------------------------------

MANY = 200 * 200


def tokens():
    """Many numbers near 3, whose sum in bfloat16 would stop at 1024."""
    x = 3 + jax.random.normal(jax.random.key(0), (2, MANY, 4))
    return x.astype(jnp.bfloat16)


def rounded(value):
    return np.asarray(value, np.float64).astype(jnp.bfloat16)


def test_global_pools_are_rounded_once():
    x = tokens()
    wide = np.asarray(x, np.float64)
    mean, largest = wide.mean(1), wide.max(1)
    expected = {
        "avg": mean,
        "max": largest,
        "avgmax": (mean + largest) / 2,
        "catavgmax": np.concatenate([mean, largest], -1),
    }
    assert expected.keys() == GLOBAL_POOLS.keys()
    for name, pool in GLOBAL_POOLS.items():
        found = pool(x)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, rounded(expected[name]), err_msg=name)


@pytest.mark.parametrize("name", ["squeeze excite", "gate of channels"])
def test_gates_see_the_mean_in_float32(name):
    """A gate of a large map of bfloat16 is that of its mean, alone on a map of one place."""
    make, _, _ = LAYERS[name]
    x = jnp.concatenate([tokens().reshape(2, 200, 200, 4)] * 4, axis=-1)
    layer = make(dtype=jnp.float32, rngs=nnx.Rngs(0))
    mean = np.asarray(x, np.float64).mean((1, 2), keepdims=True).astype(np.float32)
    gate = np.asarray(layer(jnp.asarray(mean))) / mean
    np.testing.assert_allclose(layer(x), np.asarray(x, np.float32) * gate, rtol=1e-5)


def test_statistics_of_a_batch_are_those_of_float64():
    x = tokens().reshape(2, 200, 200, 4)
    norm = BatchNorm(4, momentum=0.0, dtype=jnp.bfloat16)
    norm(x, train=True)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(norm.mean[...], wide.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], wide.var((0, 1, 2), ddof=1), rtol=1e-4)


@pytest.mark.parametrize("kind", ["avg2", "avg"])
@pytest.mark.parametrize("padding", ["same", "centred"])
def test_local_means_are_rounded_once(kind, padding):
    x = tokens()[:, :99].reshape(2, 11, 9, 4)
    found = pool_half(x, kind, padding)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, pool_half(x.astype(jnp.float32), kind, padding).astype(jnp.bfloat16))
    np.testing.assert_array_equal(half(x), half(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("stride", [2, 3])
def test_centres_of_outlook_attention_are_rounded_once(stride):
    x = tokens()[:, :99].reshape(2, 11, 9, 4)
    found = outlook_centres(x, stride=stride)
    assert found.dtype == jnp.bfloat16
    exact = outlook_centres(x.astype(jnp.float32), stride=stride)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
