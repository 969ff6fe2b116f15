"""Core lines broken on purpose, each in a copy of the source: does a test notice?

    python -m bench.faults.mutate
    python -m bench.faults.mutate --only auroc --only "store"

A mutant that survives is a line that no test of those named would miss. `tests/faults` holds a test
that every line of the table still stands in the source, once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A line, what is put in its place, and the tests of which one must fail.

    Attributes:
        name: What goes wrong.
        file: In `src/demur`.
        old: Text that occurs once in it.
        new: Put in its place.
        tests: As pytest names them.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied_to(self, text: str) -> str:
        """The file with the mutation.

        Raises:
            ValueError: The old text does not occur exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} holds {text.count(self.old)} times: {self.old!r}")
        return text.replace(self.old, self.new)


_PROPERTIES = "tests/faults/test_properties.py::"
_SILENT = "tests/faults/test_silent.py::"
MUTANTS = (
    Mutant(
        "sign of a direction: from harmful to harmless",
        "estimators.py",
        "return positive.double().mean(0) - negative.double().mean(0)",
        "return negative.double().mean(0) - positive.double().mean(0)",
        (_PROPERTIES + "test_every_estimator_points_from_the_negative_class_to_the_positive",),
    ),
    Mutant(
        "ablation reflects instead of projecting",
        "interventions.py",
        "unit, value=-1.0).to(x.dtype)",
        "unit, value=-2.0).to(x.dtype)",
        (_PROPERTIES + "test_edits_do_what_their_names_say",),
    ),
    Mutant(
        "a site is one block too low",
        "models/model.py",
        "way = links(self.blocks, str(site.layer))",
        "way = links(self.blocks, str(max(site.layer - 1, 0)))",
        (_PROPERTIES + "test_a_site_is_the_tensor_that_transformers_calls_so",),
    ),
    Mutant(
        "positions are read one token too early",
        "activations.py",
        "columns = chunk.ends.unsqueeze(1) + torch.tensor(list(positions))",
        "columns = chunk.ends.unsqueeze(1) + torch.tensor(list(positions)) - 1",
        (_PROPERTIES + "test_a_site_is_the_tensor_that_transformers_calls_so",),
    ),
    Mutant(
        "the template's first token behind the instruction is left out",
        "models/tokens.py",
        "            post[i, stop:end] = True",
        "            post[i, stop + 1 : end] = True",
        ("tests/models/test_tokens.py::test_spans_tile_the_row",),
    ),
    Mutant(
        "KL from the edited model to the plain one",
        "selection.py",
        "return (p.exp() * (p - q)).sum(1).cpu()",
        "return (q.exp() * (q - p)).sum(1).cpu()",
        (_PROPERTIES + "test_kl_and_log_odds",),
    ),
    Mutant(
        "refusal log-odds upside down",
        "selection.py",
        "return logits[:, inside].logsumexp(1) - logits[:, ~inside].logsumexp(1)",
        "return logits[:, ~inside].logsumexp(1) - logits[:, inside].logsumexp(1)",
        (_PROPERTIES + "test_kl_and_log_odds",),
    ),
    Mutant(
        "the candidate that bypasses least is chosen",
        "selection.py",
        "relaxations(row, criteria), row.means[0]",
        "relaxations(row, criteria), -row.means[0]",
        ("tests/test_selection.py::test_the_planted_layer_is_chosen",),
    ),
    Mutant(
        "every seed gives the same split",
        "prompts.py",
        "return _rank(seed, min(member.pair",
        "return _rank(0, min(member.pair",
        ("tests/test_prompts.py::test_seeds_differ_and_nothing_stays",),
    ),
    Mutant(
        "a family may be parted by a split",
        "prompts.py",
        '_FAMILY = ("pair", "quad", "core")',
        '_FAMILY = ("quad", "core")',
        (_PROPERTIES + "test_no_family_is_in_two_parts",),
    ),
    Mutant(
        "a near-duplicate of one of a family may go elsewhere",
        "prompts.py",
        "    for indices in [*units.values(), *places]:\n        joined.join(indices)",
        "    for indices in places:\n        joined.join(indices)",
        (_PROPERTIES + "test_a_near_duplicate_of_any_of_a_family_stays_with_it",),
    ),
    Mutant(
        "conformal quantile without its +1",
        "guard.py",
        "k = math.ceil((1 - alpha) * (n + 1) - 1e-9)",
        "k = math.ceil((1 - alpha) * n - 1e-9)",
        (_PROPERTIES + "test_a_conformal_threshold_keeps_its_promise",),
    ),
    Mutant(
        "a request at the threshold is flagged",
        "guard.py",
        "scores > self.threshold.value)",
        "scores >= self.threshold.value)",
        (_SILENT + "test_a_request_at_the_threshold_is_not_flagged",),
    ),
    Mutant(
        "what a guard cannot score passes for benign",
        "guard.py",
        'if bad.any():\n            raise NonFiniteError(\n                f"a score is NaN or',
        'if False:\n            raise NonFiniteError(\n                f"a score is NaN or',
        (_SILENT + "test_a_guard_does_not_let_pass_what_it_cannot_score",),
    ),
    Mutant(
        "an anchor's gate opens below its threshold",
        "anchor.py",
        "if trace.opened is None and score > gate.threshold.value:",
        "if trace.opened is None and score < gate.threshold.value:",
        ("tests/test_anchor.py::test_a_row_that_opens_leaves_the_others",),
    ),
    Mutant(
        "a floor is a ceiling",
        "anchor.py",
        "return gap.clamp(min=0).minimum(most[places])",
        "return gap.clamp(max=0).minimum(most[places])",
        ("tests/test_anchor.py::test_a_floor_only_lifts",),
    ),
    Mutant(
        "Benjamini and Hochberg's step left out",
        "hydra/stages.py",
        'method="fdr_bh")',
        'method="bonferroni")',
        (_PROPERTIES + "test_a_false_discovery_rate",),
    ),
    Mutant(
        "p values are corrected too little",
        "stats.py",
        "[order] * np.arange(len(ps), 0, -1)",
        "[order] * (len(ps) / np.arange(1, len(ps) + 1))",
        ("tests/test_stats.py::test_holm_by_hand",),
    ),
    Mutant(
        "AUROC upside down",
        "stats.py",
        "roc_auc_score(positive, numbers)",
        "roc_auc_score(positive, -numbers)",
        (_PROPERTIES + "test_an_auroc_is_one_where_all_that_should_score_higher_does",),
    ),
    Mutant(
        "Wilson's interval at twice the error",
        "stats.py",
        'alpha=1 - level, method="wilson"',
        'alpha=2 * (1 - level), method="wilson"',
        ("tests/test_stats.py::test_wilson_by_hand",),
    ),
    Mutant(
        "a null effect as large as the observed one does not count",
        "stats.py",
        "high = (int((effects >= value).sum()) + 1) / (len(effects) + 1)",
        "high = (int((effects > value).sum()) + 1) / (len(effects) + 1)",
        (_PROPERTIES + "test_a_null_p_is_never_zero",),
    ),
    Mutant(
        "an unparsed verdict is no refusal",
        "evals/rates.py",
        "None if outcome is Outcome.UNPARSED else outcome in wanted",
        "outcome in wanted",
        (_SILENT + "test_a_causal_leg_counts_replies_without_a_verdict_either_way",),
    ),
    Mutant(
        "a kept prefix outlives the edit it was computed under",
        "models/model.py",
        "key = (self._edition, first, self._end,",
        "key = (first, self._end,",
        ("tests/models/test_model.py::test_a_kept_prefix_is_computed_anew",),
    ),
    Mutant(
        "padding takes part in attention while replies are written",
        "models/model.py",
        "ids,\n            chunk,\n            attention_mask=None if bool(mask.all()) else",
        "ids,\n            chunk,\n            attention_mask=None if True else",
        ("tests/models/test_model.py::test_replies_are_those_of_a_plain_loop",),
    ),
    Mutant(
        "hooks that no pass reaches go unnoticed",
        "models/model.py",
        "            if module is base:\n                self._check_reached()",
        "            if module is base:\n                pass",
        (_SILENT + "test_a_hook_that_is_lost_after_it_once_ran_is_an_error",),
    ),
    Mutant(
        "weight edits leave the embedding out",
        "edits.py",
        "written: dict[str, LinearWrite] = {w.path: w for w in model.family.embeddings}",
        "written: dict[str, LinearWrite] = {}",
        ("tests/test_edits.py::test_hook_equals_weights",),
    ),
    Mutant(
        "a record's inputs are no part of its key",
        "store.py",
        '"inputs": [str(ref) for ref in inputs]}\n        return Ref(',
        '"inputs": []}\n        return Ref(',
        (_PROPERTIES + "test_a_key_hangs_on_what_is_said_and_not_on_its_order",),
    ),
    Mutant(
        "the last reply is told while its edits are in force",
        "serve/engine.py",
        "            self._sites.clear()\n        last, self._last",
        "            pass\n        last, self._last",
        ("tests/serve/test_engine.py::test_nothing_is_in_force_when_the_last_reply_is_told",),
    ),
    Mutant(
        "hooks do not make the model their thread's own",
        "models/model.py",
        "                failed.callback(self._claimed())\n",
        "",
        ("tests/faults/test_silent.py::test_another_thread_does_not_get_edited_results",),
    ),
)


def copied(folder: Path) -> Path:
    """A copy of the repository's code and tests, which imports itself."""
    for name in ("src", "tests", "bench"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", folder)
    return folder


def outcome(place: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit status of pytest on the copy, and its last lines."""
    nodes: list[str] = []
    wanted: list[str] = []
    for one in tests:
        file, _, name = one.partition("::")
        if file not in nodes:
            nodes.append(file)
        if name:
            wanted.append(name)
    # Prefixes of names: parametrised tests need not be listed one by one.
    whole = any("::" not in one for one in tests)
    select = [] if whole else ["-k", " or ".join(wanted)]
    environment = {**os.environ, "PYTHONPATH": str(place / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *nodes, *select],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stdout[-2000:] + run.stderr[-500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="mutants whose name holds this")
    parser.add_argument("--plain", action="store_true", help="run the tests without mutations too")
    chosen = parser.parse_args()
    mutants = [m for m in MUTANTS if not chosen.only or any(o in m.name for o in chosen.only)]
    if not mutants:
        parser.error(f"no mutant has {' or '.join(chosen.only)} in its name")
    survived: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as held:
        place = copied(Path(held))
        if chosen.plain:
            tests = tuple(dict.fromkeys(test for one in mutants for test in one.tests))
            status, said = outcome(place, tests)
            if status:
                print(said, file=sys.stderr)
                return 2
        for mutant in mutants:
            path = place / "src" / "demur" / mutant.file
            plain = path.read_text(encoding="utf-8")
            began = time.monotonic()
            try:
                path.write_text(mutant.applied_to(plain), encoding="utf-8")
                status, said = outcome(place, mutant.tests)
            finally:
                path.write_text(plain, encoding="utf-8")
            # 1: a test failed. Anything else (none was found, it did not import) proves nothing.
            caught = status == 1 and " failed" in said
            if not caught:
                survived.append(mutant.name)
                if status:
                    print(said, file=sys.stderr)
            word = "caught" if caught else "SURVIVED"
            print(f"{word:9}{time.monotonic() - began:6.1f} s  {mutant.name}", flush=True)
    print(f"{len(mutants) - len(survived)} of {len(mutants)} mutants caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
