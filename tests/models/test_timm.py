"""timm itself (extra `bench`): it has the models that we say, reads the files that we write, and computes the same."""

import math

import jax
import numpy as np
import pytest
import tiny_models
from flax import nnx

import models
from benchmarks import timm_models
from models.core import aliases
from models.core.registry import image_size, options_of_model

torch = pytest.importorskip("torch", reason="needs the bench extra")
pytest.importorskip("timm", reason="needs the bench extra")
pytestmark = pytest.mark.bench

SHALLOW = {"depth": 2}
# Variant: options of both sides that make it smaller, and the sides of an image that is not square.
CASES = {
    "vit_ti16": (SHALLOW, (64, 96)),
    "deit_ti16_distilled": (SHALLOW, (64, 96)),
    "deit3_s16": (SHALLOW, (64, 96)),
    "dinov2_s14_reg4": (SHALLOW, (56, 84)),
    "vit_wee16_reg1": (SHALLOW, (64, 96)),
    "vit_b32_siglip": (SHALLOW, (128, 192)),
    "swin_tiny": ({}, (224, 256)),
    "maxvit_tiny": ({}, (64, 96)),
    "davit_tiny": ({}, (100, 64)),
    "davit_base_fl": ({}, (64, 100)),
    "volo_d1": ({}, (64, 96)),
    "halonet26t": ({}, (256, 512)),
    "sehalonet33ts": ({}, (256, 512)),
    "eca_halonext26ts": ({}, (256, 512)),
    "halonet_h1": ({}, (256, 512)),
    "halo2botnet50ts": ({}, (256, 512)),
    "haloregnetz_b": ({}, (224, 448)),
}
NO_SIZE = ("davit",)  # of timm's models, those that are not told the size of images


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_timm_reads_what_is_written_and_computes_the_same(name, tmp_path):
    """Strictly, and with equal logits; and its own state dict comes back bit for bit."""
    from safetensors.torch import load_file

    options, sides = CASES[name]
    abstract = nnx.eval_shape(
        lambda: models.create(name, num_classes=10, image_size=sides, rngs=nnx.Rngs(0), **options)
    )
    graph, params, state = models.split(abstract)
    params, state = tiny_models.numbers(params), tiny_models.numbers(state)
    model = models.merge(graph, params, state)
    models.export_weights(model, tmp_path / "w.safetensors")

    told = {} if name.startswith(NO_SIZE) else {"img_size": sides}
    official = timm_models.create(timm_models.timm_name(name), num_classes=10, **options, **told).eval()
    official.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    images = np.random.default_rng(1).normal(size=(2, *sides, 3)).astype(np.float32)
    with torch.no_grad():
        expected = official(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    found = jax.jit(lambda p, s, x: models.merge(graph, p, s)(x))(params, state, images)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()

    theirs = {key: value.numpy() for key, value in official.state_dict().items()}
    again = models.convert_weights(model, theirs)[:2]
    for ours, converted in zip((params, state), again, strict=True):
        unrolled = models.unstack({key: np.asarray(value) for key, value in ours.items()})
        assert converted.keys() == unrolled.keys()
        for key, value in unrolled.items():
            np.testing.assert_array_equal(converted[key], value, err_msg=key)


@pytest.mark.parametrize("name", [name for name in models.names() if timm_models.timm_name(name)])
def test_timm_has_the_model_with_as_many_parameters(name):
    """At timm's own image size, of which positions depend."""
    with torch.device("meta"):
        official = timm_models.create(timm_models.timm_name(name), num_classes=1000)
    theirs = sum(parameter.numel() for parameter in official.parameters())
    side = official.default_cfg["input_size"][1]
    options = {} if side == image_size(name) else {"image_size": side}
    ours = nnx.eval_shape(lambda: models.create(name, num_classes=1000, rngs=nnx.Rngs(0), **options))
    assert sum(math.prod(value.shape) for value in models.split(ours)[1].values()) == theirs


def test_timm_has_the_names_and_tags_with_as_many_classes():
    """All that `names.json` say of timm; names without tags are those that it no longer uses."""
    timm_models.create("vit_tiny_patch16_224")  # whether or not torchvision is there
    from timm.models import get_pretrained_cfg, is_model

    known = [
        one for variant in models.names() for one in aliases.names_of(variant) if one.source == "timm" and one.tags
    ]
    assert len(known) > 150
    for one in known:
        assert is_model(one.name), one.name
        for tag in ("", *one.tags):
            full = f"{one.name}.{tag}" if tag else one.name
            assert get_pretrained_cfg(full).num_classes == options_of_model(full)["num_classes"], full
