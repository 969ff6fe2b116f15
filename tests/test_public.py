"""The public names: pinned, all there, and free until they are used."""

import subprocess
import sys

import pytest

import demur

PUBLIC = {
    "Ablate",
    "Add",
    "Anchor",
    "DemurError",
    "Direction",
    "Estimate",
    "Guard",
    "Model",
    "ObliqueErase",
    "ProjectToMean",
    "PromptSet",
    "RunConfig",
    "Site",
    "Span",
    "Store",
    "__version__",
    "applied",
    "as_delta",
    "audit",
    "candidates",
    "collect",
    "edited",
    "estimators",
    "interventions",
    "judges",
    "load",
    "load_direction",
    "load_anchor",
    "load_guard",
    "load_prompts",
    "moments",
    "read_config",
    "read_results",
    "save_anchor",
    "save_direction",
    "save_guard",
    "select",
}
# None of these is needed to parse a command line, and each costs from 0.1 s to seconds.
HEAVY = {
    "altair",
    "numpy",
    "pandas",
    "peft",
    "pydantic",
    "scipy",
    "sklearn",
    "statsmodels",
    "torch",
    "transformers",
}


def test_the_public_names_are_these():
    assert set(demur.__all__) == PUBLIC
    assert len(demur.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_resolves(name):
    assert getattr(demur, name) is not None
    assert name in dir(demur)


def test_a_module_stays_a_module_whatever_was_imported_first():
    # `import demur.estimators` sets the attribute, so it must not mean the registry at times.
    import demur.estimators

    assert demur.estimators.estimators is sys.modules["demur.estimators"].estimators
    assert "patterns" in demur.judges.judges
    assert "ablate" in demur.interventions.interventions


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = demur.nothing


def test_importing_demur_and_its_command_line_imports_nothing_heavy():
    code = f"import sys, demur, demur.cli; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
