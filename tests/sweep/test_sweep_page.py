"""The page of a sweep says what its record holds, and nothing in it runs."""

import json

import numpy as np
import pytest
from tests.pages import HOSTILE, assert_inert

from demur.errors import StoreError
from demur.report import words
from demur.results import sealed_json
from demur.stats import Estimate
from demur.sweep.page import write_sweep
from demur.sweep.table import (
    SweepResults,
    SweepRow,
    agreement,
    cosines,
    read_results,
    with_cosines,
)

OUTCOMES = ("auroc", "ablation", "addition", "kl")


def estimate(rng, n):
    low, value, high = np.sort(rng.uniform(-1, 1, 3))
    return Estimate(float(value), float(low), float(high), n, "test 95%")


def swept(models=("one", "two"), estimators=("a", "b"), seeds=(0, 1, 2), failed=(), seed=0):
    """Results of drawn figures, and the directions behind them."""
    rng = np.random.default_rng(seed)
    rows, units = [], []
    for model in models:
        for name in estimators:
            for at in seeds:
                about = {"model": model, "estimator": name, "seed": at}
                if len(rows) in failed:
                    rows.append(SweepRow(**about, error=f"broke {HOSTILE}", hint="mend it"))
                    units.append(None)
                    continue
                rows.append(
                    SweepRow(
                        **about,
                        site="3.resid_pre",
                        position=-2,
                        norm=1.0,
                        usable=at == 0,
                        seconds=3.0,
                        run="runs/x",
                        **{key: estimate(rng, 20) for key in OUTCOMES},
                    )
                )
                units.append(rng.standard_normal(16))
    pairs = cosines(rows, units)
    found = SweepResults(
        demur="0",
        config={},
        rows=with_cosines(rows, pairs),
        agreement=agreement(rows, pairs),
        cosines=pairs,
    )
    return found, units


def page_of(folder, results):
    record = folder / "results.json"
    record.write_text(sealed_json(results), encoding="utf-8")
    path = write_sweep(record)
    assert path == folder / "sweep.html"
    return path.read_text(encoding="utf-8")


def test_cosines_are_of_all_pairs_of_one_model_and_of_no_other():
    found, units = swept(failed=(1, 8))
    own = {(i, j) for i in range(6) for j in range(i + 1, 6)}
    both = own | {(i + 6, j + 6) for i, j in own}
    assert {(row.a, row.b) for row in found.cosines} == {
        pair for pair in both if not {1, 8} & set(pair)
    }
    for row in found.cosines:
        u, v = units[row.a], units[row.b]
        assert row.value == pytest.approx(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    for i, row in enumerate(found.rows):
        mine = [pair.value for pair in found.cosines if i in (pair.a, pair.b)]
        if row.error is None:
            assert (row.cosine.low, row.cosine.high, row.cosine.n) == (min(mine), max(mine), 4)
            assert row.cosine.value == pytest.approx(np.mean(mine))
        else:
            assert row.cosine is None


def test_every_figure_of_the_record_stands_on_the_page(tmp_path):
    found, _ = swept(failed=(7,))
    page = assert_inert(page_of(tmp_path, found))
    text = page.text
    for row in found.rows:
        for key in OUTCOMES:
            value = getattr(row, key)
            if value is not None:
                kind = "points" if key in ("ablation", "addition") else "number"
                said = str(words.estimate(value, kind, n=False).striptags())
                assert said in text, (key, said)
    for one in found.agreement:
        assert str(words.estimate(one.cosine, "signed", n=False).striptags()) in text
    for pair in found.cosines:
        assert words.number(pair.value, ".2f", signed=True) in text
    assert "4 of 11 audits stand" in text
    assert "n: refusals 20, AUROC 20, KL 20" in text
    assert "mend it" in text
    assert page.ids.count("agree") == 1
    assert len(set(page.ids)) == len(page.ids)


def test_names_and_errors_of_strangers_stay_text(tmp_path):
    found, _ = swept(models=(HOSTILE, f"{HOSTILE}|b"), failed=(0,))
    html = page_of(tmp_path, found)
    assert_inert(html)
    assert "<script" not in html
    assert "\u202e" not in html


@pytest.mark.parametrize(
    ("changes", "said", "missing"),
    [
        ({"models": ("one",), "estimators": ("a",), "seeds": (0,)}, "The audit stands", "agree"),
        ({"models": ("one",), "seeds": (0,)}, "All 2 audits stand", None),
        (
            {"models": ("one",), "estimators": ("a",), "seeds": (1,)},
            "The audit does not stand",
            "agree",
        ),
        (
            {"models": ("one",), "seeds": (0,), "failed": (0, 1)},
            "No audit came to its end",
            "agree",
        ),
    ],
)
def test_small_and_broken_sweeps_have_a_page_too(tmp_path, changes, said, missing):
    found, _ = swept(**changes)
    page = assert_inert(page_of(tmp_path, found))
    assert said in page.text
    assert missing is None or missing not in page.ids
    whole = any(row.error is None for row in found.rows)
    assert ("outcomes" in page.ids) is whole


def test_a_record_from_before_there_were_pairs_is_read(tmp_path):
    found, _ = swept()
    tree = found.model_dump(mode="json")
    del tree["cosines"]
    record = tmp_path / "results.json"
    record.write_text(json.dumps(tree), encoding="utf-8")
    assert read_results(record).cosines == []
    assert "agree" not in assert_inert(write_sweep(record).read_text("utf-8")).ids


def test_a_changed_record_is_refused(tmp_path):
    found, _ = swept()
    record = tmp_path / "results.json"
    text = sealed_json(found)
    record.write_text(text.replace('"usable": false', '"usable": true', 1), encoding="utf-8")
    with pytest.raises(StoreError, match="changed after it was written"):
        write_sweep(record)
    record.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be read"):
        write_sweep(record)
    assert not (tmp_path / "sweep.html").exists()
