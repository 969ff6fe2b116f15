import tomllib

import pytest

from demur.config import RunConfig, as_toml, read_config
from demur.errors import ConfigError


@pytest.mark.parametrize("adapter", [None, "auto", "some/folder"])
def test_what_is_written_is_read_back(tmp_path, adapter):
    config = read_config(
        None,
        {"model.adapter": adapter, "selection.max_kl": 0.2, "extraction.layers": (3, 4), "seed": 5},
    )
    path = tmp_path / "config.toml"
    path.write_text(as_toml(config))
    assert read_config(path) == config
    assert tomllib.loads(as_toml(config))["seed"] == 5


def test_changes_are_laid_over_the_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[data]\nfit = 20\nreport = 30\n")
    config = read_config(path, {"data.fit": 40})
    assert (config.data.fit, config.data.report) == (40, 30)
    assert config.test == RunConfig().test


def test_all_faults_are_listed_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        read_config(None, {"selection.max_kll": 1, "data.fit": "many", "test.nulls": 0})
    assert "`max_kl`" in caught.value.fact
    assert "data.fit" in caught.value.fact
    assert "test.nulls" in caught.value.fact


@pytest.mark.parametrize("text", ["[data\n", "\xff"])
def test_a_file_that_is_no_toml_is_one_clear_error(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="no TOML"):
        read_config(path)


def test_a_path_through_a_value_is_refused():
    with pytest.raises(ConfigError, match="is a value"):
        read_config(None, {"seed": 3, "seed.x": 1})
