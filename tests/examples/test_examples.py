"""The hosts in docs/examples: small, whole, and made of the pieces of the house."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from make_resnet import weights

import models
from models.attention.registry import ATTENTION
from models.weights.family import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "examples"))

import decoder  # noqa: E402
import resnet  # noqa: E402
import unet  # noqa: E402

both = pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])


def random(model, seed=0):
    """The model with parameters of which none is zero, the same for a scanned one and its unrolled twin."""
    graph, params, state = models.split(model)
    rng = np.random.default_rng(seed)
    flat = models.unstack({name: np.zeros(value.shape, np.float32) for name, value in params.items()})
    drawn = {name: (0.3 * rng.standard_normal(flat[name].shape)).astype(np.float32) for name in sorted(flat)}
    drawn = {name: value + name.endswith("scale") for name, value in drawn.items()}
    return models.merge(graph, {n: jnp.asarray(v) for n, v in models.stack(drawn, like=params).items()}, state)


def close(found, expected, tolerance=1e-5):
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("name", ["decoder", "resnet", "unet"])
def test_a_host_is_small(name):
    lines = (ROOT / "docs" / "examples" / f"{name}.py").read_text().splitlines()
    assert len(lines) < 150


# --- decoder ----------------------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(2).integers(0, 17, (2, 8))


def make_decoder(**own):
    options = {"vocabulary": 17, "width": 16, "depth": 3, "heads": 2, "length": 8} | own
    return random(decoder.Decoder(decoder.DecoderOptions(**options), rngs=nnx.Rngs(0)))


@both
def test_prefill_and_steps_are_the_full_pass(scan):
    """In pieces of any size; the state goes through one compiled function."""
    model = make_decoder(scan=scan)
    full = model(TOKENS)
    close(full, make_decoder(scan=not scan)(TOKENS))
    step = jax.jit(lambda tokens, state: model(tokens, state=state))
    for cuts in ([5, 6, 7, 8], [1, 4, 8]):
        state, found, begin = model.empty(2, 10), [], 0
        for end in cuts:
            logits, state = step(TOKENS[:, begin:end], state)
            found.append(logits)
            begin = end
        close(np.concatenate(found, 1), full)
        np.testing.assert_array_equal(state["length"], 8)


def test_a_token_sees_only_those_before_it():
    model = make_decoder()
    later = np.array(TOKENS)
    later[:, 5:] = (later[:, 5:] + 1) % 17
    full, other = model(TOKENS), model(later)
    close(full[:, :5], other[:, :5])
    assert not np.allclose(full[:, 5:], other[:, 5:], atol=1e-2)
    # Rotary positions: the same token somewhere else has another answer.
    same = np.full((1, 8), 3)
    assert not np.allclose(make_decoder()(same)[0, 1], make_decoder()(np.array([[3, 4, 3]]))[0, 2], atol=1e-2)


def test_a_decoder_is_looked_into_and_trained():
    model, tap = make_decoder(dropout=0.1), models.record("probs", layers=1)
    model(TOKENS, tap=tap)
    maps = tap["probs"][0]
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert np.abs(np.triu(maps, 1)).max() == 0
    gradient = nnx.grad(lambda model: model(TOKENS, train=True, key=jax.random.key(0)).var())(model)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"attention": "window"}, "attention 'window' does not fit here: window attention is for grids of 2 axes"),
        ({"attention": "channel"}, "channel attention takes no mask of kind causal"),
        ({"depth": 0}, "depth=0; allowed: an integer of at least 1"),
    ],
)
def test_a_decoder_says_what_it_cannot_be(own, message):
    with pytest.raises(ValueError, match=message):
        make_decoder(**own)(TOKENS)


def test_a_mechanism_without_state_says_so():
    model = make_decoder(attention="neighborhood", attention_options={"window": [3]})
    model(TOKENS)
    with pytest.raises(ValueError, match="neighborhood attention keeps no state"):
        model(TOKENS, state=model.empty(2, 8))


# --- ResNet -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def family():
    if "resnet" not in FAMILIES:
        models.register_family(resnet.RESNET)


def test_a_resnet_equals_that_of_timm():
    """The number of parameters, logits and features, from weights by the official names, there and back."""
    with np.load(Path(__file__).with_name("resnet18.npz")) as archive:
        golden = dict(archive)
    model = nnx.eval_shape(lambda: models.create("resnet18", rngs=nnx.Rngs(0)))
    assert sum(value.size for value in models.split(model)[1].values()) == 11_689_512
    theirs = weights(json.loads(str(golden["shapes"])))
    assert models.load_weights(model, theirs) == []
    found = model.features(jnp.asarray(golden["x"]).transpose(0, 2, 3, 1))
    close(found["logits"], golden["y"], 1e-4)
    close(found["stages.3"].transpose(0, 3, 1, 2), golden["features"], 1e-4)
    written = models.export_weights(model)
    assert written.keys() == theirs.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


SMALL = {"widths": (8, 16), "depths": (2, 2), "heads": 2, "image_size": 32, "num_classes": 5}


@pytest.mark.parametrize("name", ["dense", "neighborhood", "window", "outlook", "channel"])
def test_a_resnet_holds_an_attention(name):
    own = {"neighborhood": {"window": 3}, "window": {"window": 2}}.get(name)
    model = random(
        models.create("resnet18", attention=name, attention_options=own, attended=(1,), **SMALL, rngs=nnx.Rngs(0))
    )
    images, tap = jax.random.normal(jax.random.key(0), (2, 32, 32, 3)), models.record("heads")
    assert np.isfinite(model(images, tap=tap)).all()
    layers = sorted(layer for found in tap.values.layers.values() for layer in found)
    assert layers == [2, 3]
    with pytest.raises(ValueError, match="halo attention: sides of a map of"):
        models.create("resnet18", attention="halo", attended=(1,), **SMALL, rngs=nnx.Rngs(0))
    assert name in ATTENTION


# --- U-Net ------------------------------------------------------------------------------------------------------------


def make_unet(**own):
    options = {"widths": (8, 16), "text_width": 6, "image_size": 8, "heads": 2, "depth": 2, "text_length": 3} | own
    return random(unet.UNet(unet.UNetOptions(**options), rngs=nnx.Rngs(0)))


def noisy(model, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, shape.shape) for key, shape in zip(keys, model.inputs(2), strict=True)]


@both
def test_a_unet_is_told_a_time_and_a_text(scan):
    """Each moves the answer of its own example, and of no other."""
    model = make_unet(scan=scan)
    images, times, text = noisy(model)
    plain = model(images, times, text)
    assert plain.shape == images.shape
    close(plain, make_unet(scan=not scan)(images, times, text))
    for other in ((images, times.at[0].add(1), text), (images, times, text.at[0].add(1))):
        changed = model(*other)
        assert not np.allclose(changed[0], plain[0], atol=1e-2)
        close(changed[1], plain[1])


def test_a_unet_has_skips_and_gradients():
    """What is fine reaches the answer beside the coarse way; every parameter has a gradient."""
    model = make_unet()
    images, times, text = noisy(model)
    with pytest.raises(ValueError, match=r"no site 'routes' was reached; this model has embedded, block\.in"):
        model(images, times, text, tap=models.record("routes"))
    last = model.depth // 2 - 1
    silent = models.replace(jnp.zeros(()), "block.out", layers=last)
    with pytest.raises(ValueError, match=r"a tap gave \[\] for site down.1.block.out, which is \[2, 16, 16\]"):
        model(images, times, text, tap=silent)
    gone = models.tap("block.out", layers=[last])(lambda site, value: 0 * value)
    pixels = jax.grad(lambda x: model(x, times, text, tap=gone).sum())(images)
    assert np.abs(pixels).max() > 1e-3
    gradient = nnx.grad(lambda model: model(images, times, text).var())(model)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_a_unet_says_what_does_not_fit():
    with pytest.raises(ValueError, match="attention 'halo' does not fit here"):
        make_unet(attention="halo")
    model = make_unet()
    images, times, text = noisy(model)
    with pytest.raises(ValueError, match="linear layer for 6 channels is given"):
        model(images, times, text[..., :5])
