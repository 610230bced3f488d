"""The table of docs/models.md: all models are in it, figures are kept, and it goes where it belongs.

That its parameters and multiply-adds are those of the models is in `test_contract_variants.py`.
"""

import json

import pytest

import models
from benchmarks import timm_models, zoo
from benchmarks.pages import write_between
from models.core.published import PUBLISHED
from models.core.summary import Cost


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two small models, and a store and a page of their own."""
    names = ["deit_ti16", "vit_mu16"]
    monkeypatch.setattr(zoo, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(zoo, "PAGE", tmp_path / "models.md")
    monkeypatch.setattr(zoo.models, "names", lambda: names)
    zoo.families.cache_clear()
    zoo.PAGE.write_text(f"before\n{zoo.MARKS[0]}\nold\n{zoo.MARKS[1]}\nafter\n")
    yield names
    zoo.families.cache_clear()


def test_the_page_has_every_model_and_what_is_published():
    rows = zoo.rows_of(zoo.PAGE.read_text())
    assert rows.keys() == {*models.names()}, "run python -m benchmarks.zoo"
    cpu, tpu = zoo.read("cpu"), zoo.read("v5e")
    for name, cells in rows.items():
        published = PUBLISHED.get(name)
        assert cells["top-1"] == ((published and published.top1) or "-"), name
        assert cells["published"] == ((published and published.multiply_adds) or "-"), name
        assert (cells["CPU, images/s"] == "-") is (name not in cpu), name
        assert (cells["v5e train, images/s"] == "-") is ("images" not in tpu.get(name, {})), name


def test_a_table_is_written_between_its_marks_and_read_back(two):
    zoo.keep("cpu", "vit_mu16", {"ours": 30.0, "timm": 20.0, "batch": 8, "versions": "jax 1, torch 2"})
    zoo.keep("v5e", "deit_ti16", {"images": 1234.5, "most_images": 5000, "batch": 32, "versions": "jax 1, libtpu 2"})
    write_between(zoo.PAGE, "table", zoo.table())
    page = zoo.PAGE.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    rows = zoo.rows_of(page)
    assert list(rows) == ["vit_mu16", "deit_ti16"]
    assert rows["deit_ti16"]["parameters"] == "5 717 416"
    assert rows["deit_ti16"]["multiply-adds, G"] == "1.25"
    assert rows["deit_ti16"]["published"] == "1.3"
    assert rows["deit_ti16"]["top-1"] == "72.2"
    assert rows["deit_ti16"]["v5e train, images/s"] == "1234 (batch 32)"
    assert rows["vit_mu16"]["ours : timm"] == "1.50"
    assert rows["vit_mu16"]["top-1"] == rows["deit_ti16"]["CPU, images/s"] == "-"
    assert "CPU: jax 1, torch 2." in page
    write_between(zoo.PAGE, "table", "")
    zoo.PAGE.write_text("nothing")
    with pytest.raises(ValueError, match="no mark"):
        write_between(zoo.PAGE, "table", "")


def test_what_is_measured(two):
    """The smallest of a family that timm has, or all; not again what has figures."""
    assert zoo.chosen("none", ["*"], "cpu", False) == []
    assert zoo.chosen("one", ["*"], "cpu", False) == ["deit_ti16"]  # timm has no vit_mu16
    assert zoo.chosen("one", ["*"], "v5e", False) == ["vit_mu16"]
    assert zoo.chosen("all", ["*"], "v5e", False) == ["vit_mu16", "deit_ti16"]
    assert zoo.chosen("all", ["deit_*", "swin_*"], "v5e", False) == ["deit_ti16"]
    zoo.keep("v5e", "vit_mu16", {"refused": "too large", "versions": ""})
    assert zoo.chosen("all", ["*"], "v5e", False) == ["deit_ti16"]
    assert zoo.chosen("all", ["*"], "v5e", True) == ["vit_mu16", "deit_ti16"]
    assert json.loads((zoo.FIGURES / "v5e.json").read_text())["vit_mu16"]["refused"] == "too large"
    assert zoo.row("vit_mu16", {}, zoo.read("v5e"))["v5e train, images/s"] == "-"


def test_figures_are_rounded_as_the_page_says():
    assert zoo.figures(Cost(1_234_567, 12_345_678_901, 5)) == {
        "parameters": "1 234 567",
        "multiply-adds, G": "12.35",
    }


def test_names_in_timm():
    expected = {
        "vit_s16": "vit_small_patch16_224",
        "vit_G14": "vit_gigantic_patch14_224",
        "vit_m16": None,
        "vit_so400m14_siglip": "vit_so400m_patch14_siglip_224",
        "vit_b32_clip": "vit_base_patch32_clip_224",
        "deit_b16_distilled": "deit_base_distilled_patch16_224",
        "dinov2_g14_reg4": "vit_giant_patch14_reg4_dinov2",
        "vit_wee16_reg1": "vit_wee_patch16_reg1_gap_256",
        "swin_large_384": "swin_large_patch4_window12_384",
        "maxvit_tiny": "maxvit_tiny_tf_224",
        "volo_d5_512": "volo_d5_512",
        "davit_huge_fl": "davit_huge_fl",
        "nat_tiny": None,
    }
    assert {name: timm_models.timm_name(name) for name in expected} == expected
