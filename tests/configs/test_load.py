"""Wrong recipes: each error names its key, its code and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.load import dump_config, load_config
from configs.schema import RunConfig


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sead=1", "sead"),
        ("phases.1.mask_rate=2", "phases.1.mask_rate"),
        ("phases.1.mask_rate=1", "phases.1.mask_rate"),
        ("phases.1.mask_rate=[0.3,0]", "phases.1.mask_rate"),
        ("phases.1.sources.medquat=1", "phases.1.sources.medquat"),
        ("phases.1.sources={}", "phases.1.sources"),
        ("phases.1.batch.sequences=6", "data.streams"),
        ("batch.sequences=0", "batch.sequences"),
        ("phases.0.objective=xlm", "phases.0.objective"),
        ("data.sources.0.shards=pipe:ls", "data.sources.0.shards"),
        ("parallel.sequence=true", "parallel"),
        ("data.streams=3", "data.streams"),
        ("data.evaluation.text=notes.txt data.evaluation.shards=shards/medquad", "data"),
        ("fp8_bf16_edges=true fp8_recipe=delayed", "fp8_bf16_edges"),
    ],
)
def test_wrong_value_is_an_error_with_its_key(override: str, key: str) -> None:
    with pytest.raises(InputError) as error:
        load_config("demo", override.split())
    assert (error.value.key, error.value.code) == (key, "invalid-config")
    assert f"\n  {key}: " in str(error.value)


@pytest.mark.parametrize("key", ["phases.2.steps", "phases.7", "data.sources.3.weight"])
def test_an_override_past_the_end_is_refused(key: str) -> None:
    with pytest.raises(InputError) as error:
        load_config("demo", [f"{key}=2"])
    assert (error.value.key, error.value.code) == (key, "override-past-the-end")


def test_missing_key_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "{name: a, tokenizer: b, data: {sources: [{name: c, shards: d}]}, phases: [{objective: clm, steps: 1}]}"
    )
    with pytest.raises(InputError) as error:
        load_config(str(recipe))
    assert error.value.key == "model"


@pytest.mark.parametrize(
    "odds", ["{clm: 1}", "{clm: 1, mlm: 0}", "{clm: 1, xlm: 1}", "{clm: 1, mlm: .inf}", "[clm, mlm]"]
)
def test_odds_that_are_none(odds: str) -> None:
    with pytest.raises(InputError) as error:
        load_config("demo", [f"phases.0.objective={odds}"])
    assert error.value.key == "phases.0.objective"


def test_odds_are_shares_in_one_order(tmp_path: Path) -> None:
    config = load_config("demo", ["phases.0.objective={mlm: 15, clm: 1}"])
    assert (
        config.phases[0].objectives == {"clm": 1 / 16, "mlm": 15 / 16} and config.phases[0].objective_name == "clm+mlm"
    )
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


@given(st.from_regex(r"[0-9][0-9._eE-]{0,5}", fullmatch=True), st.text(r"\\${}:' ab"))
@settings(deadline=None, max_examples=40)
@example("3e-4", "${HOME}")
def test_a_configuration_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, name: str, where: str
) -> None:
    tree = load_config("demo").model_dump(mode="json")
    tree["name"] = tree["data"]["sources"][0]["name"] = name
    tree["data"]["sources"][0]["reading"]["where"] = where
    tree["phases"][0]["sources"] = {name: 1}
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    tree["data"]["sources"] = tree["data"]["sources"][:1]
    config = RunConfig.model_validate(tree)
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(path)) == config


def test_an_override_may_point_to_another_key() -> None:
    assert load_config("demo", ["seed=${data.streams}"]).seed == 4


@pytest.mark.parametrize("key", ["phases.0.sources.v1.5", "phases[0].sources.v1.5", "phases.0.sources[v1.5]"])
def test_names_of_sources_may_have_dots(key: str) -> None:
    config = load_config("demo", ["data.sources.0.name=v1.5", f"{key}=2", "phases.0.sources.tico19-en=1"])
    assert config.phases[0].sources == {"v1.5": 2, "tico19-en": 1}


def test_a_mapping_of_names_takes_the_place_of_the_old_one() -> None:
    first = "phases.0.sources={medquad: 1, tico19-fr: 2}"
    assert load_config("demo", [first, "phases.0.sources={medquad: 3}"]).phases[0].sources == {"medquad": 3}


def test_environment_variables_give_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE", "0.3")
    phases = load_config(
        "demo", ["phases.0.mask_rate=${oc.env:RATE}", "phases.1.objective={clm: '${oc.env:RATE}', mlm: 1}"]
    ).phases
    assert phases[0].mask_rate == 0.3 and phases[1].objective == {"clm": 0.3, "mlm": 1}


@pytest.mark.parametrize(
    "override", ["seed", "=1", "phases.nine.steps=1", "seed={", "phases={}", "seed=&a [*a]", "name=#1"]
)
def test_malformed_override(override: str) -> None:
    with pytest.raises(InputError) as error:
        load_config("demo", [override])
    assert error.value.code == "override-malformed" and override in str(error.value)


def test_an_override_has_no_comment() -> None:
    """A folder may be called `notes #2`, and `notes` beside it must not take its place."""
    for value in ("notes #2", "Anna's notes #2's", "[a, b #c]"):
        with pytest.raises(InputError) as error:
            load_config("demo", [f"data.sources.0.text={value}"])
        assert error.value.code == "override-malformed" and "comment" in str(error.value)
    for value, name in (('"notes #2"', "notes #2"), ("a#b", "a#b"), ("'#'", "#")):
        assert load_config("demo", [f"data.sources.0.text={value}"]).data.sources[0].text == (name,)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "not-a-mapping"),
        ("a: 1\na: 2", "invalid-yaml"),
        (None, "file-unreadable"),
        ("name: ${nothing}", "invalid-yaml"),
    ],
)
def test_file_that_is_no_recipe(text: str | None, code: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(str(recipe))
    assert error.value.code == code and "recipe.yaml" in str(error.value)


def test_misspelt_recipe_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(InputError) as error:
        load_config("one-gpu-evenin")
    assert error.value.code == "unknown-name" and "'one-gpu-evening'" in str(error.value)


def test_the_tokenizer_follows_from_the_model() -> None:
    assert load_config("one-gpu-evening").tokenizer == "answerdotai/ModernBERT-base"
    assert load_config("one-gpu-evening", ["model.init=org/other@v2"]).tokenizer == "org/other@v2"
    assert load_config("one-gpu-evening", ["tokenizer=mine"]).tokenizer == "mine"
    assert "tokenizer" not in RunConfig.model_json_schema()["required"]
    with pytest.raises(InputError) as refusal:
        load_config("one-gpu-evening", ["model.init=scratch", "model.size=tiny"])
    assert refusal.value.key == "tokenizer"
