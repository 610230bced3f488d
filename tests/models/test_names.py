"""Names of other projects: each means a variant that is made, a wrong one suggests its own kind of model."""

import json
import re

import pytest
from flax import nnx

import models
from benchmarks import zoo
from models.core import aliases
from models.core.registry import options_of_model
from models.families.vit import FAMILY as VIT
from models.weights.family import FAMILIES, Family, register_family

ALL = [(name, tag) for name, (one,) in aliases._MEANINGS.items() for tag in ("", *one.tags)]

HUGGING = {"position_resample": "cubic"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "variant", "options"),
    [
        ("vit_small_patch16_224", "vit_s16", {}),
        ("vit_small_patch16_224.augreg_in21k_ft_in1k", "vit_s16", {}),
        ("vit_small_patch16_224.dino", "vit_s16", {"num_classes": 0}),
        ("timm/vit_base_patch16_384.augreg_in1k", "vit_b16", {"image_size": 384}),
        ("hf-hub:timm/davit_tiny.msft_in1k", "davit_tiny", {}),
        ("google/vit-base-patch16-224", "vit_b16", HUGGING | {"norm_eps": 1e-12}),
        ("facebook/deit-small-distilled-patch16-224", "deit_s16_distilled", HUGGING | {"norm_eps": 1e-12}),
        ("facebook/dinov2-small", "dinov2_s14", HUGGING | {"num_classes": 0}),
        ("facebook/dinov2-with-registers-small", "dinov2_s14_reg4", {"num_classes": 0, "prefix_positions": True}),
        ("microsoft/swin-tiny-patch4-window7-224", "swin_tiny", {"pad_first": True}),
        ("google/siglip-base-patch16-224", "vit_b16_siglip", HUGGING | {"num_classes": 0}),
        ("openai/clip-vit-base-patch32", "vit_b32_clip", HUGGING | {"num_classes": 512, "activation": "quick_gelu"}),
        ("shi-labs/dinat-mini-in1k-224", "dinat_mini", {}),
        ("vit_b_16", "vit_b16", {}),
        ("swin_t", "swin_tiny", {"pad_first": True}),
        ("dinov2_vits14", "dinov2_s14", {"num_classes": 0}),
    ],
)
def test_a_name_is_a_variant_with_options(name, variant, options):
    assert models.variant(name) == models.variant(variant) | options


def test_every_name_means_what_models_take():
    """All options are those of the class, with values that it allows."""
    assert len(ALL) > 500
    for name, tag in ALL:
        full = f"{name}.{tag}" if tag else name
        options = models.variant(full)
        family = next(f for f in FAMILIES.values() if aliases.meaning(full)[0] in f.variants)
        family.model.Options(**options)
        assert options_of_model(full).keys() == options_of_model(aliases.meaning(full)[0]).keys()


def test_a_model_is_made_by_a_name_and_options_of_the_user_go_first():
    model = nnx.eval_shape(lambda: models.create("facebook/dinov2-small", depth=1, num_classes=7, rngs=nnx.Rngs(0)))
    assert (model.options.num_classes, model.options.width, model.options.position_resample) == (7, 384, "cubic")
    assert model.options.image_size == 518


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("vit_smal_patch16_224", "vit_small_patch16_224"),
        ("vit_small_patch16", "vit_small_patch16_224"),
        ("swin_xx", "swin_t"),
        ("deit-small", "deit_s16"),
        ("dinov2-small", "facebook/dinov2-small"),
        ("clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("facebook/dinov3-small", "facebook/dinov2-small"),
        ("ViT-B/16", "vit_b16"),
        ("maxvit_tiny_224", "maxvit_tiny_tf_224"),
    ],
)
def test_a_wrong_name_suggests_the_same_kind_of_model(wrong, nearest):
    with pytest.raises(ValueError, match=rf"^unknown model '{wrong}'; nearest: (\S+, )*{nearest}[,;]") as error:
        models.create(wrong, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)


def test_a_wrong_tag_says_which_there_are():
    with pytest.raises(
        ValueError, match=r"^unknown tag of 'swin_tiny_patch4_window7_224' 'ms_in2k'; nearest: ms_in22k, ms_in1k, .*"
    ):
        models.variant("swin_tiny_patch4_window7_224.ms_in2k")
    with pytest.raises(ValueError, match=r"^'swin_t' has no tags: 'swin_t\.v1'$"):
        models.variant("swin_t.v1")


def test_a_name_of_several_things_is_refused(monkeypatch):
    monkeypatch.setattr(aliases, "_MEANINGS", dict(aliases._MEANINGS))
    aliases.register_names({"here": {"b16": {"variant": "vit_b16"}}, "there": {"b16": {"variant": "deit_b16"}}})
    with pytest.raises(ValueError, match=r"^model name 'b16' is ambiguous: vit_b16 \(here\), deit_b16 \(there\); say"):
        models.variant("b16")
    aliases.register_names({"here": {"b8": {"variant": "vit_b8"}}, "there": {"b8": {"variant": "vit_b8"}}})
    assert models.variant("b8") == models.variant("vit_b8")


def test_a_name_for_a_variant_that_there_is_not_is_refused():
    names = {"here": {"x": {"variant": "vit_b61"}}}
    with pytest.raises(ValueError, match=r"unknown variant of 'other' for 'x' 'vit_b61'; nearest: vit_b16"):
        register_family(Family("other", VIT.model, {"vit_b16": {}}, names=names))
    assert "other" not in FAMILIES


def test_the_page_has_every_name():
    page = zoo.PAGE.read_text()
    begin, end = zoo.marks("names")
    assert page.partition(begin)[2].partition(end)[0].strip() == zoo.names_table(), (
        "run python -m benchmarks.zoo --names"
    )
    for name, _ in ALL:
        assert re.search(rf"`{re.escape(name)}`", page), name


def test_files_of_names_are_sorted():
    """So that a name is found, and merges do not collide."""
    for file in sorted(zoo.ROOT.parent.glob("models/families/*/names.json")):
        for source, names in json.loads(file.read_text()).items():
            assert list(names) == sorted(names), (file, source)
