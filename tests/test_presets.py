"""Every preset is a whole configuration, every field a flag, and config.json gives it back."""

import json
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args

import pytest

from minilora.summarization.errors import UserError
from minilora.summarization.flags import parse_run
from minilora.summarization.presets import LEARNING_RATES, PRESETS, embedded
from minilora.summarization.settings import GROUPS, RunConfig, spelt

FIELDS = [(group, field) for group, kind in GROUPS.items() for field in fields(kind)]
NAMES = [field.name for _, field in FIELDS]


def other_value(field: "Field[Any]") -> tuple[list[str], Any]:
    """What to type for a value unlike the default, and that value."""
    special: dict[str, Any] = {
        "min_length": 3,
        "targets": ["fc1", "fc2"],
        "exclude": ["k_proj"],
        "layers": [0, 2],
        "rank_pattern": ["fc1=4"],
        "also_train": ["final_layer_norm"],
        "prefix_places": ["decoder", "cross"],
        "learning_rate": 0.25,
        "warmup": 0.5,
        "max_length": 99,
    }
    if field.name in special:
        value = special[field.name]
    elif choices := get_args(field.type):
        value = next((c for c in choices if isinstance(c, str) and c != field.default), "x")
    elif field.type is bool:
        no = "--no-" if field.default else "--"
        return ([spelt(field.name).replace("--", no, 1)], not field.default)
    elif field.type in (int, float):
        value = field.type(field.default + 2)
    else:
        value = "elsewhere"
    typed = value if isinstance(value, list) else [value]
    return ([spelt(field.name), *map(str, typed)], value)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_parses_and_has_a_learning_rate_for_each_method(preset: str) -> None:
    default = RunConfig().to_dict()
    for method in ("lora", "full"):
        run = parse_run(["--preset", preset, "--method", method])
        rate = LEARNING_RATES[preset][method]
        wanted = default | PRESETS[preset] | {"preset": preset, "method": method}
        assert run.to_dict() == wanted | {"learning_rate": rate}


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_beat_the_preset(preset: str) -> None:
    for name in ({"model", "batch_size", "max_length"} | set(PRESETS[preset])) & set(NAMES):
        field = next(field for _, field in FIELDS if field.name == name)
        typed, value = other_value(field)
        for argv in (["--preset", preset, *typed], [*typed, "--preset", preset]):
            assert parse_run(argv).to_dict()[name] == value


def usual() -> dict[str, Any]:
    """The settings of a run without flags."""
    return RunConfig().to_dict() | PRESETS["pocket"]


# --adapter names an adapter, which decides other settings, and --accept-changes needs --resume:
# tests/test_start.py.
@pytest.mark.parametrize(
    ("group", "field"),
    [pair for pair in FIELDS if pair[1].name not in ("adapter", "accept_changes")],
    ids=lambda one: str(getattr(one, "name", "")),
)
def test_every_field_is_a_flag_with_hyphens_and_underscores(
    group: str, field: "Field[Any]", tmp_path: Path
) -> None:
    if field.name == "resume":  # it must name a run
        (tmp_path / "config.json").write_text(json.dumps(usual()))
        typed, value = ["--resume", str(tmp_path)], str(tmp_path)
    else:
        typed, value = other_value(field)
    for flag in {typed[0], "--" + typed[0][2:].replace("-", "_")}:
        run = parse_run([flag, *typed[1:]])
        assert getattr(getattr(run, group), field.name) == value
        others = {k: v for k, v in run.to_dict().items() if k not in (field.name, "learning_rate")}
        assert others.items() <= usual().items()


def test_no_two_groups_share_a_field() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_help_groups_the_flags_and_explains_every_one(capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_run(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for kind in GROUPS.values():
        assert f"\n{kind._argument_group_name}:" in text
    flat = " ".join(text.split())
    for _, field in FIELDS:
        assert spelt(field.name) in flat
        assert " ".join(field.metadata["help"].split()[:3]) in flat


@pytest.mark.parametrize("preset", PRESETS)
def test_config_json_gives_the_settings_back(preset: str) -> None:
    run = parse_run(["--preset", preset, "--targets", "fc1", "fc2", "--seed", "7"])
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_config_json_of_an_older_version_takes_the_defaults() -> None:
    assert RunConfig.from_dict({"rank": 3}).adapter.rank == 3
    assert RunConfig.from_dict({}) == RunConfig()
    with pytest.raises(UserError, match="unknown settings: rnak, zero"):
        RunConfig.from_dict({"zero": 1, "rank": 1, "rnak": 3})


@pytest.mark.parametrize(
    "entry",
    [
        *({"rank": value} for value in ("8", 8.0, True, None)),
        *({"targets": value} for value in ("q_proj", [1])),
        *({"learning_rate": "1"}, {"alpha": [1]}, {"method": "lroa"}, {"preset": "samsum"}),
        *({"model": 5}, {"evaluate": 1}),
    ],
    ids=str,
)
def test_config_json_of_another_type_is_named(entry: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(entry))} is .*, not (of type|one of) "):
        RunConfig.from_dict(entry)
    assert RunConfig.from_dict({"alpha": 8, "learning_rate": None}).adapter.alpha == 8


def test_two_configurations_share_no_list() -> None:
    one, two = RunConfig(), RunConfig()
    one.adapter.targets.append("fc1")
    assert two.adapter.targets == ["attention"]


def test_embedded_names_are_directories_and_all_others_stay() -> None:
    for data in ("bookings", "minichat", "minichat-hard"):
        assert Path(embedded(data), "train.jsonl").is_file()
    assert embedded("facebook/bart-base") == "facebook/bart-base"
