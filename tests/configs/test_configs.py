"""Configuration files, overrides and their errors."""

import pickle
import re
from pathlib import Path

import pytest

import configs
import errors
from configs import schema, shipped
from configs.base import FIELDS

pytestmark = pytest.mark.smoke

QUICKSTART = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.py")
SMALL = {"data.batch_size": 64, "train.steps": 100}


def write(tmp_path, body):
    path = tmp_path / "experiment.py"
    path.write_text(
        "from configs import base\n\ndef get_config(arg=''):\n    config = base.get_config()\n"
        + body
        + "\n    return config\n"
    )
    return str(path)


def test_overrides_take_the_type_of_the_key():
    config = configs.load(
        QUICKSTART,
        {
            "optim.learning_rate": "3",
            "train.steps": "2 epochs",
            "optim.freeze": "blocks.0,head",
            "model.scan": "false",
            "data.mean": "0.5,0.5,0.5",
            "model.options.stem": "patches",
            "model.options.width": "32",
        },
    )
    assert config.optim.learning_rate == 3.0
    assert isinstance(config.optim.learning_rate, float)
    assert config.train.steps == configs.Duration(2, "epochs")
    assert config.optim.freeze == ("blocks.0", "head")
    assert config.model.scan is False
    assert config.data.mean == (0.5, 0.5, 0.5)
    assert config.model.options["stem"] == "patches"
    assert config.model.options["width"] == 32


def test_optimizers_of_optax_are_named_with_their_options():
    config = configs.load(QUICKSTART, {"optim.name": "optax:adan", "optim.options.b1": "0.9"})
    assert config.optim.name == "optax:adan"
    assert dict(config.optim.options) == {"b1": 0.9}
    saved = configs.as_dict(config)
    (line,) = configs.differences(saved, configs.replace(config, optim__options__b1=0.8))
    assert line == "optim.options.b1: 0.9 -> 0.8"
    with pytest.raises(ValueError, match=r"one of adamw, .*, optax:NAME"):
        configs.load(QUICKSTART, {"optim.name": "optax"})


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("(?!head).*", ("(?!head).*",)),
        ("[ab].*,head", ("[ab].*", "head")),
        ("(stem|head),pos_embed", ("(stem|head)", "pos_embed")),
        ("('a{1,2}', 'b')", ("a{1,2}", "b")),
        ("['a{1,2}']", ("a{1,2}",)),
        ("", ()),
    ],
)
def test_a_regular_expression_may_begin_as_a_list_does(text, patterns):
    assert configs.load(QUICKSTART, {"optim.freeze": text}).optim.freeze == patterns


def test_an_entry_of_an_option_is_set_by_itself(tmp_path):
    path = write(tmp_path, "    config.model.options = dict(convolution=dict(momentum=0.9), width=3)")
    changes = {"model.options.convolution.size": "1", "model.options.attention_options.kernel.window": "5"}
    options = configs.load(path, changes).model.options
    assert dict(options["convolution"]) == {"momentum": 0.9, "size": 1}
    assert options["attention_options"]["kernel"]["window"] == 5
    with pytest.raises(ValueError, match=r"'model\.options\.width' is a value, not a group: 3"):
        configs.load(path, {"model.options.width.first": "1"})


def test_command_line_is_split():
    path, overrides, rest = configs.split_arguments(
        ["--config=a.py:x=1", "--config.optim.ema=0.9", "--workdir", "w", "--config.seed", "3"]
    )
    assert (path, overrides, rest) == ("a.py:x=1", {"optim.ema": "0.9", "seed": "3"}, ["--workdir", "w"])


def test_a_file_gets_its_argument_and_may_change_values_only(tmp_path):
    path = write(tmp_path, "    config.train.steps = '3 epochs' if arg == 'long' else 1")
    assert configs.load(path + ":long").train.steps == configs.Duration(3, "epochs")
    assert configs.load(path).train.steps == configs.Duration(1, "steps")
    with pytest.raises(ValueError, match=r"learning_rat.*learning_rate") as error:
        configs.load(write(tmp_path, "    config.optim.learning_rat = 1"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lerning_rate", "1", r"config.optim.lerning_rate: no such key \(nearest: learning_rate\)"),
        ("optim.lr", "1", "nearest: learning_rate"),
        ("learning_rate", "1", "there is optim.learning_rate"),
        ("optm.name", "sgd", "nearest: optim"),
        ("optim", "sgd", "a group"),
        ("optim.name.x", "sgd", "is a value, not a group"),
        ("data.mean", "(0.5,0.5", "takes a list"),
        ("data.mean", "a,b,c", "takes a list"),
        ("model.options.rate", float("nan"), "config.model.options=.*without NaN"),
        ("optim.name", "adam", r"one of adamw, .*nearest: adamw"),
        ("optim.learning_rate", "fast", "takes a number, at least 0"),
        ("optim.learning_rate", "nan", "takes a number"),
        ("optim.learning_rate", "-1", "at least 0"),
        ("data.batch_size", "1.5", "a whole number"),
        ("data.batch_size", "true", "a whole number"),
        ("model.scan", "maybe", "true or false"),
        ("train.steps", "3 fortnights", "90 epochs"),
        ("train.steps", "10%", "cannot be a share"),
        ("optim.warmup", "150%", "duration"),
        ("optim.accumulate", "7", "must divide data.batch_size"),
        ("data.std", "0,0,0", "positive"),
        ("mesh.data", "0", "-1 or a number"),
    ],
)
def test_bad_values_name_the_key_and_what_is_allowed(key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        configs.load(QUICKSTART, {key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "raise SystemExit('no')"])
def test_a_file_that_ends_the_program_does_not(tmp_path, line):
    with pytest.raises(errors.FileOfUser, match=r"experiment.py:\d+: SystemExit"):
        configs.load(write(tmp_path, f"    {line}"))


def test_a_file_that_is_no_python_is_said():
    with pytest.raises(ValueError, match=r"--config=README.md: is no Python file \(.py\)"):
        configs.load("README.md")


def test_missing_file_names_the_nearest():
    with pytest.raises(FileNotFoundError, match=r"nearest: quickstart.py"):
        configs.load(QUICKSTART.replace("quickstart", "quikstart"))


def test_durations():
    parse = configs.Duration.parse
    lengths = dict(batch_size=100, examples=1050)
    assert parse("1000").steps(**lengths) == 1000
    assert parse("2 epochs").steps(**lengths) == 21
    assert parse("1e4 examples").steps(**lengths) == 100
    assert parse("5%").steps(total=200, **lengths) == 10
    assert parse("1%").steps(total=3, **lengths) == 1  # never rounded to nothing
    assert parse("0 epochs").steps(**lengths) == 0
    assert str(parse("2.5epochs")) == "2.5 epochs"
    assert str(parse(" 5 % ")) == "5%"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("0.1 epochs", "0.1 epochs"),
        ("33.333333333333336%", "33.333333333333336%"),
        ("1234567.5 epochs", "1234567.5 epochs"),
        ("1281167 examples", "1281167 examples"),
        ("9007199254740993", "9007199254740993"),  # no float64
        ("1e6 examples", "1000000 examples"),
        ("1e22 examples", "1e+22 examples"),
        (1e-7, None),
        ("0.0000001 epochs", "1e-07 epochs"),
        (2.0, "2"),
    ],
)
def test_durations_keep_their_digits(text, written):
    if written is None:
        with pytest.raises(ValueError, match="no whole number of steps"):
            configs.Duration.parse(text)
        return
    duration = configs.Duration.parse(text)
    assert str(duration) == written
    assert configs.Duration.parse(str(duration)) == duration
    saved = configs.as_dict(configs.load(QUICKSTART, {"optim.warmup": written}))
    assert configs.from_dict(saved).optim.warmup == duration
    assert saved["optim"]["warmup"] == written


@pytest.mark.parametrize("text", ["1e999 epochs", "9" * 400])
def test_durations_that_are_no_number_are_refused(text):
    with pytest.raises(ValueError, match="is no finite duration"):
        configs.Duration.parse(text)


def test_reads_are_recorded_and_undeclared_reads_fail():
    config = configs.load(QUICKSTART)
    schema.READS.clear()
    _ = config.optim.learning_rate
    _ = configs.as_dict(config), configs.digest(config), configs.describe(config), configs.flat_values(config)
    assert {"optim.learning_rate"} == schema.READS
    with pytest.raises(AttributeError, match="nearest: learning_rate"):
        _ = config.optim.learning_rat
    with pytest.raises(AttributeError):
        config.optim.learning_rate = 1
    assert configs.as_dict(pickle.loads(pickle.dumps(config))) == configs.as_dict(config)


def test_saved_configurations_round_trip_and_differ_only_where_it_matters():
    config = configs.load(QUICKSTART, SMALL)
    saved = configs.as_dict(config)
    assert configs.digest(configs.from_dict(saved)) == configs.digest(config)
    assert (
        configs.differences(
            saved, configs.replace(config, log__every_steps=7, model__scan=False, checkpoint__keep_last=9)
        )
        == []
    )
    (line,) = configs.differences(saved, configs.replace(config, optim__learning_rate=0.5))
    assert line.startswith("optim.learning_rate: ")
    assert line.endswith("-> 0.5")
    other = configs.replace(config, model__options={**saved["model"]["options"], "pool": "map"})
    assert configs.differences(saved, other) == ["model.options.pool: unset -> 'map'"]


def test_keys_of_older_configurations_have_their_present_names():
    older = configs.as_dict(configs.load(QUICKSTART, SMALL))
    older["task"] = {}
    older["train"] |= {"task": "classification", "loss": "sigmoid", "mixup": 0.2, "cutmix": 0.0, "options": {}}
    config = configs.from_dict(older, {"train.teacher": "runs/a"})
    assert configs.as_dict(config.task) == {
        "name": "classification",
        "options": {"loss": "sigmoid", "mixup": 0.2, "teacher": "runs/a"},
    }


def test_a_key_that_was_set_and_not_read_is_found():
    config = configs.replace(configs.load(QUICKSTART, SMALL), optim__momentum=0.5)
    assert "config.optim.momentum=0.5" in configs.unread(config)
    assert config.optim.momentum == 0.5
    assert "config.optim.momentum=0.5" not in configs.unread(config)
    assert not any("optim.b1" in line for line in configs.unread(config))  # at its default


def test_every_key_is_documented():
    for key, field in schema.flatten(FIELDS).items():
        assert field.doc.endswith("."), key
        assert schema.check(key, field, field.default) == field.default


def test_describe_shows_every_key():
    text = configs.describe(configs.load(QUICKSTART, {"seed": 5}))
    for key in schema.flatten(FIELDS):
        assert f" {key} = " in text
    assert "* seed = 5" in text


@pytest.mark.parametrize(
    ("given", "size"),
    [("224", 224), (96, 96), ("160x224", (160, 224)), ("(160, 224)", (160, 224)), ([64, 32], (64, 32)), ("32x32", 32)],
)
def test_a_size_is_a_side_or_height_and_width(given, size):
    config = configs.load(QUICKSTART, {"data.image_size": given})
    assert config.data.image_size == size
    assert configs.from_dict(configs.as_dict(config)).data.image_size == size


@pytest.mark.parametrize("given", ["0", "32x0", "1x2x3", "big", "1.5", "true"])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(ValueError, match=r"config\.data\.image_size=.*takes one number of pixels .* or HEIGHTxWIDTH"):
        configs.load(QUICKSTART, {"data.image_size": given})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("config.optim.lerning_rate = 1", r"5: config\.optim\.lerning_rate: no such key \(nearest: learning_rate\)$"),
        ("config.modle.name = 'x'", r"5: config\.modle: no such key \(nearest: model\)$"),
        (
            "config.model.update({'dropuot': 0.1})",
            r"5: config\.model\.dropuot: no such key \(nearest: dropout, drop_path",
        ),
        ("x = config['optim'].lr", r"5: config\.optim\.lr: no such key \(nearest: learning_rate\)$"),
        ("config.optim.schedule = 'cosin'", r"5: config\.optim\.schedule='cosin': takes one of .*nearest: cosine\)$"),
        ("config.optim.update({'schedule': 'cosin'})", r"5: config\.optim\.schedule='cosin'"),
        (
            "config.data.mean = (0, 0)\n    config.seed = 1",
            r"5: config\.data\.std has 3 channels, config\.data\.mean 2",
        ),
        ("recipes.digits(config).data.batch_size = 'x'", r"5: config\.data\.batch_size='x': takes a whole number"),
    ],
)
def test_what_a_file_gets_wrong_is_told_with_its_line(tmp_path, body, said):
    path = write(tmp_path, f"    {body}")
    Path(path).write_text(Path(path).read_text().replace("import base", "import base, recipes"))
    with pytest.raises(errors.FileOfUser, match=re.escape(path) + ":" + said) as error:
        configs.load(path)
    assert "\n" not in str(error.value)


def test_what_the_command_line_gets_wrong_has_no_line_of_a_file(tmp_path):
    path = write(tmp_path, "    config.optim.schedule = 'cosin'\n    config.data.mean = (0, 0)")
    with pytest.raises(ValueError, match=r"^config\.optim\.schedule='cosn'"):
        configs.load(path, {"optim.schedule": "cosn"})
    with pytest.raises(ValueError, match=r"^config\.data\.std has 1 channels"):
        configs.load(path, {"optim.schedule": "cosine", "data.std": "1"})
    assert configs.load(path, {"optim.schedule": "cosine", "data.mean": "0,0,0"}).optim.schedule == "cosine"


def test_an_experiment_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.load("quickstart").model.name == "nat_mini"
    assert configs.load("finetune_folder:flowers").data.name == "folder:flowers"
    (tmp_path / "quickstart").mkdir()
    assert configs.load("quickstart").model.name == "nat_mini"
    for name, near in (("quikstart", "quickstart"), ("vit_digit", "vit_digits"), ("quickstart.py", "quickstart")):
        with pytest.raises(FileNotFoundError, match=rf"--config={name}: no such file \(nearest: {near}"):
            configs.load(name)
    with pytest.raises(FileNotFoundError, match="`python -m configs` lists names"):
        configs.load("zzz")
    assert {"base", "load", "schema"}.isdisjoint(shipped.names())
