"""docs/results.md: written from the summaries of runs, by nothing else."""

import json

import pytest

import configs
from benchmarks import learning
from benchmarks.learning import CONTROL, PAGE, REFERENCE, SETS, STORE
from models.core.summary import Cost


@pytest.fixture
def small(monkeypatch):
    """Models that need no tracing."""
    monkeypatch.setattr(learning, "cost", lambda name: Cost(parameters=1234, multiply_adds=2_500_000))


def run(config, attention, seed, top1, data="digits"):
    return {
        "config": config,
        "attention": attention,
        "seed": seed,
        "top1": top1,
        "data": data,
        "commit": "a" * 40,
        "versions": {"jax": "0"},
        "command": f"python train.py --config=configs/{config}.py",
    }


def test_the_page_is_that_of_the_store():
    assert PAGE.read_text() == learning.page(json.loads(STORE.read_text())), "run python -m benchmarks.learning --write"


def test_every_small_configuration_was_trained_with_some_seeds_and_beside_its_control():
    store = [one for one in json.loads(STORE.read_text()) if one["data"] == SETS["digits"].data]
    assert {one["config"] for one in store} == {*learning.names()}
    for name in learning.names():
        own, control = (
            {one["seed"] for one in store if one["config"] == name and one["attention"] == kind}
            for kind in ("", CONTROL)
        )
        assert own == control >= {0, 1, 2}, name
        trained = {one["parameters"] for one in store if one["config"] == name and not one["attention"]}
        assert trained == {learning.cost(name).parameters}, f"{name} has changed: run python -m benchmarks.learning"
    for one in store:
        assert not one["commit"].endswith("+changes"), one["command"]


def test_a_run_is_known_by_its_configuration():
    path = str(learning.ROOT / "configs" / "swin_digits.py")
    found = configs.digest(configs.load(path, {"seed": "1", "model.attention": CONTROL}))
    store = [{"config": "swin_digits", "attention": CONTROL, "seed": 1, "config_hash": found}]
    assert learning.is_known(store, "swin_digits", CONTROL, 1, "digits")
    for other in (("swin_digits", CONTROL, 2, "digits"), ("swin_digits", "", 1, "digits")):
        assert not learning.is_known(store, *other)
    assert not learning.is_known(store, "swin_digits", CONTROL, 1, "fashion")
    assert not learning.is_known([store[0] | {"config_hash": "0" * 12}], "swin_digits", CONTROL, 1, "digits")


def test_a_row_compares_means(small):
    runs = [run("swin_digits", "", 1, 0.98), run("swin_digits", "", 0, 0.97), run("swin_digits", CONTROL, 0, 0.9)]
    found = learning.row("swin_digits", runs, reference=98.5)
    assert found["top-1 by seed"] == "97.00, 98.00"
    assert (found["mean"], found["less the ViT"], found["attention gives"]) == ("97.50", "-1.00", "+7.50")
    assert (found["parameters"], found["multiply-adds, M"]) == ("1,234", "2.5")


def test_a_control_that_is_as_good_is_named(small):
    runs = [run(REFERENCE, "", 0, 0.9), run("swin_digits", "", 0, 0.9), run("swin_digits", "", 1, 0.8)]
    assert "as one of the model: none." in learning.page([*runs, run("swin_digits", CONTROL, 0, 0.79)])
    assert "as one of the model: `swin_digits.py`." in learning.page([*runs, run("swin_digits", CONTROL, 0, 0.8)])


def test_each_set_has_its_table(small):
    runs = [run(REFERENCE, "", 0, 0.5, one.data) for one in SETS.values()]
    page = learning.page(runs)
    assert [line for line in page.splitlines() if line.startswith("## ")][:-1] == [
        f"## {one.title}" for one in SETS.values()
    ]
    assert learning.page(runs[:1]).count(f"| `{REFERENCE}.py` |") == 1


@pytest.mark.parametrize("data_set", SETS)
def test_the_command_is_what_a_user_types(data_set):
    words = learning.command("swin_digits", CONTROL, 3, "runs/x", data_set)
    assert words[:4] == ["train.py", "--config=configs/swin_digits.py", "--workdir=runs/x", "--config.seed=3"]
    assert words[-1] == "--config.model.attention=identity"
    assert (f"--config.data.name={SETS[data_set].data}" in words) is (data_set != "digits")
