"""Weights by name: found in a cache as Hugging Face lays it out or in a folder; checked; downloaded when asked only."""

import hashlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import models
from models.core import aliases
from models.families.vit import FAMILY
from models.weights import hub
from models.weights.files import write_safetensors

STORED = Path(__file__).resolve().parents[1] / "families" / "vit" / "hf_vit_no_bias.npz"


@pytest.fixture(scope="module")
def official():
    """(config.json, weights) that transformers wrote."""
    with np.load(STORED) as file:
        weights = {key[3:]: file[key] for key in file.files if key.startswith("sd/")}
        return json.loads(str(file["config"]))["_hf_config_json"], weights


@pytest.fixture
def model(official):
    options = FAMILY.model.Options(**FAMILY.configs["vit"].read(json.loads(official[0])))
    return nnx.eval_shape(lambda: FAMILY.model(options, rngs=nnx.Rngs(0)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return tmp_path / "hub"


def kept(cache, name, official, revision="abc", main=True):
    """A repository in a cache, as huggingface_hub keeps it: links to blobs that their hashes name."""
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir(exist_ok=True)
    write_safetensors(snapshot / "model.safetensors", official[1])
    (snapshot / "config.json").write_text(official[0])
    content, config = (snapshot / "model.safetensors").read_bytes(), (snapshot / "config.json").read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    for file, blob in (("model.safetensors", hashlib.sha256(content).hexdigest()), ("config.json", git)):
        (snapshot / file).rename(place / "blobs" / blob)
        (snapshot / file).symlink_to(Path("../../blobs") / blob)
    if main:
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(revision)
    return snapshot


def test_a_name_is_found_in_the_cache(cache, official, model, monkeypatch):
    snapshot = kept(cache, "google/vit-base-patch16-224", official)
    kept(cache, "google/vit-base-patch16-224", official, "older", main=False)
    notes = models.load_weights(model, "google/vit-base-patch16-224")
    assert notes == [f"google/vit-base-patch16-224 is {snapshot}", "names of Hugging Face"]
    np.testing.assert_array_equal(model.cls_token[...], official[1]["vit.embeddings.cls_token"])
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert models.load_weights(model, "google/vit-base-patch16-224")[0] == notes[0]
    assert models.compare_weights(model, "google/vit-base-patch16-224").startswith("fits")
    # Names that nobody here knows, of a user's own.
    kept(cache, "me/my-vit", official)
    assert models.load_weights(model, "me/my-vit")[1:] == notes[1:]


def test_timms_names_are_repositories():
    assert aliases.repository("vit_small_patch16_224.dino") == "timm/vit_small_patch16_224.dino"
    assert aliases.repository("vit_small_patch16_224") == "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"
    assert aliases.repository("hf-hub:timm/volo_d1_224.sail_in1k") == "timm/volo_d1_224.sail_in1k"
    assert aliases.repository("facebook/dinov2-small") == "facebook/dinov2-small"
    assert aliases.repository("swin_t") is None


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_file_that_is_not_what_was_published_is_refused(cache, official, model, damage):
    snapshot = kept(cache, "me/vit", official)
    blob = (snapshot / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content[:-100] if damage == "cut" else content)
    with pytest.raises(
        ValueError, match=r"bytes are not those that were published .*: cut off or changed; remove"
    ) as error:
        models.load_weights(model, "me/vit")
    assert "\n" not in str(error.value)
    blob.unlink()
    with pytest.raises(ValueError, match="a link to a file that is not there"):
        models.load_weights(model, "me/vit")


def test_a_folder_as_transformers_writes_it(tmp_path, official, model):
    place = tmp_path / "google" / "vit-base-patch16-224"
    place.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a folder without model\.safetensors or .*; it holds nothing$"):
        models.load_weights(model, place)
    (place / "config.json").write_text(official[0])
    names = list(official[1])
    parts = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    for file, own in parts.items():
        write_safetensors(place / file, {name: official[1][name] for name in own})
    index = {name: file for file, own in parts.items() for name in own}
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert models.load_weights(model, place) == ["names of Hugging Face"]
    for folder in (tmp_path, tmp_path / "google"):
        assert f"is {place}" in models.load_weights(model, "google/vit-base-patch16-224", folder=folder)[0]
    (place / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"index\.json: model-2\.safetensors is not there$"):
        models.load_weights(model, place)
    write_safetensors(tmp_path / "vit.safetensors", official[1])
    assert "vit.safetensors" in models.load_weights(model, "me/vit", folder=tmp_path)[0]


def test_another_function_is_said_and_other_heads_are_refused(tmp_path, official, model):
    write_safetensors(tmp_path / "model.safetensors", official[1])
    config = json.loads(official[0])
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    assert models.load_weights(model, tmp_path)[1:] == ["norm_eps=0.001 in config.json, 1e-12 in the model"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    with pytest.raises(ValueError, match=r"heads=4 in config\.json, 2 in the model$"):
        models.load_weights(model, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        models.load_weights(model, tmp_path)


def test_what_is_not_there_is_one_line(cache, model, monkeypatch):
    said = r"^no file of weights me/vit, and no me/vit in .*hub; download=True fetches it$"
    with pytest.raises(FileNotFoundError, match=said):
        models.load_weights(model, "me/vit")
    kept(cache, "me/two", ("{}", {"a": np.zeros(1)}), "one", main=False)
    kept(cache, "me/two", ("{}", {"a": np.zeros(1)}), "two", main=False)
    with pytest.raises(ValueError, match="has 2 revisions of me/two"):
        models.load_weights(model, "me/two")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"needs huggingface_hub; pip install huggingface_hub$"):
        models.load_weights(model, "me/vit", download=True)


def test_a_download_is_what_huggingface_hub_gives(cache, official, model, monkeypatch):
    asked = []

    def snapshot_download(name, cache_dir, allow_patterns):
        asked.append((name, Path(cache_dir), allow_patterns))
        return str(kept(cache, name, official))

    files = ["README.md", "config.json", "pytorch_model.bin", "model.safetensors"]
    fake = types.SimpleNamespace(list_repo_files=lambda name: files, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert "was downloaded to" in models.load_weights(model, "me/vit", download=True)[0]
    assert asked == [("me/vit", cache, ["config.json", "model.safetensors"])]
    models.load_weights(model, "me/vit", download=True)
    assert len(asked) == 1  # it is there now
    files[:] = ["README.md"]
    with pytest.raises(ValueError, match=r"^me/other at the Hub has no model\.safetensors or pytorch_model\.bin$"):
        models.load_weights(model, "me/other", download=True)

    def broken(name):
        raise RuntimeError("no route\nto host")

    fake.list_repo_files = broken
    with pytest.raises(OSError, match=r"^me/other cannot be downloaded: no route$"):
        models.load_weights(model, "me/other", download=True)


def test_the_cache_is_where_hugging_face_has_it(monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert hub.cache() == Path("/home/me/.cache/huggingface/hub")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert hub.cache() == Path("/c/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/h")
    assert hub.cache() == Path("/h/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/x")
    assert hub.cache() == Path("/x")
