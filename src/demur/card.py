"""The data card: what the packaged prompt sets hold and how they keep to their gates."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

from demur.anchor import Anchor
from demur.errors import UnknownNameError
from demur.gates import (
    LABELS,
    Gate,
    Tokenizers,
    agreement_gates,
    balance,
    gates,
    order_gate,
    parts_of,
)
from demur.guard import Guard
from demur.prompts import PromptSet, load, packaged

GATED = ("contrast_pairs", "lookalikes", "plain", "open_ended")


def about() -> dict[str, dict[str, str]]:
    """Title and description of every packaged set, by name."""
    text = (files("demur") / "data" / "sets.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    return {
        name: {"title": row["title"], "about": " ".join(row["about"].split())}
        for name, row in table.items()
    }


def ratings(name: str) -> list[dict[str, str]]:
    """The labels that raters gave to a packaged set, one mapping a rater from id to label."""
    path = files("demur") / "data" / "ratings" / f"{name}.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    raters = [key for key in rows[0] if key != "id"]
    return [{row["id"]: row[rater] for row in rows} for rater in raters]


def refusal_order(name: str) -> list[Gate]:
    """Which side of a packaged set's pairs models would rather refuse, as it was recorded."""
    path = files("demur") / "data" / "ratings" / f"{name}.refusals.jsonl"
    if not path.is_file():
        return []
    prompts = load(name)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    by_id = {row["id"]: row for row in rows}
    return [
        order_gate(prompts, part, [by_id[prompt.id][model] for prompt in prompts], model)
        for model in rows[0]
        if model != "id"
        for part in parts_of(prompts)[:-1]
    ]


def packaged_gates(name: str, *, tokenizers: Tokenizers | None = None) -> list[Gate]:
    """Every gate of a packaged set, the agreement of its raters included.

    Raises:
        UnknownNameError: No packaged set has that name.
    """
    if name not in packaged():
        raise UnknownNameError.among(packaged(), kind="packaged prompt set", name=name)
    prompts = load(name)
    found = gates(prompts, tokenizers=tokenizers)
    if rated := ratings(name):
        labels = {p.id: p.label for p in prompts if p.id and p.label}
        found += agreement_gates(labels, rated)
    return found


def gate_rows(found: Sequence[Gate]) -> list[tuple[str, str, str, str, str, str]]:
    """Gates as cells: part, gate, value, bounds, n, verdict."""
    rows = []
    for gate in found:
        verdict = "kept" if gate.passed else "BROKEN"
        n = f"{gate.n} {gate.unit}"
        rows.append((gate.part, gate.name, gate.shown, gate.bounds, n, verdict))
    return rows


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _counts(prompts: PromptSet) -> str:
    found = []
    for key in ("label", "kind", "format", "split"):
        values = Counter(getattr(prompt, key) for prompt in prompts if getattr(prompt, key))
        if values:
            found.append(f"{key}: " + ", ".join(f"{value} {n}" for value, n in values.items()))
    return "; ".join(found)


def _balance_table(prompts: PromptSet) -> str:
    """Prompts of each label by category, format and split; "3 / 4" where the labels differ."""
    counts = balance(prompts)

    def order(name: str) -> list[str]:
        return list(dict.fromkeys(getattr(prompt, name) or "-" for prompt in prompts))

    def cell(category: str, form: str, split: str) -> str:
        each = [counts[label, category, form, split] for label in LABELS]
        return str(each[0]) if len(set(each)) == 1 else " / ".join(map(str, each))

    splits = order("split")
    rows = [
        [category, form, *(cell(category, form, split) for split in splits)]
        for category in order("category")
        for form in sorted(order("format"))
    ]
    return _markdown(["category", "format", *splits], rows)


_HEAD = (
    "Made from the data by `demur prompts card`. All texts were written for demur, with the help "
    "of a language model, and are under Apache-2.0.",
    "Harmful requests are one mild line, without know-how and never with an answer. Left out on "
    "purpose: weapons of mass destruction, sexual content, minors, real people, brands, methods of "
    "suicide.",
    "",
    "A gate is a number with bounds. What words can tell must stay near one half, on both sides of "
    "it. AUROC are of logistic regressions, 10 folds x 5 foldings, and folds never part a pair, "
    "quad or topic; intervals are 95 %. Raters were language models that saw each request alone, "
    "each rater only one side of a pair at a time.",
)


_ORDER = (
    "Refusal log-odds of a pair's two sides by models that refuse. Selecting pairs by them would "
    "bake these models into the set: a pair that one of them orders wrongly stays. A set of your "
    "own gets the same row by `demur prompts check SET --refused-by MODEL`."
)


def card(names: Sequence[str] | None = None) -> str:
    """The data card of packaged sets in Markdown, computed from the data.

    Args:
        names: Which sets; all that are described if None.

    Raises:
        UnknownNameError: No packaged set has one of the names.
    """
    known = about()
    parts = ["# Data card", "", *_HEAD]
    for name in names if names is not None else known:
        if name not in known:
            raise UnknownNameError.among(known, kind="packaged prompt set", name=name)
        prompts = load(name)
        parts += [
            "",
            f"## {known[name]['title']} (`{name}`)",
            "",
            known[name]["about"],
            "",
            f"{len(prompts)} rows. {_counts(prompts)}".rstrip(". ") + ".",
            f"Fingerprint `{prompts.fingerprint}`.",
        ]
        head = ("part", "gate", "value", "bounds", "n", "")
        if name in GATED:
            if {prompt.label for prompt in prompts} >= set(LABELS):
                parts += ["", "### Balance, prompts of each label", "", _balance_table(prompts)]
            parts += ["", "### Gates", "", _markdown(head, gate_rows(packaged_gates(name)))]
        if order := refusal_order(name):
            parts += ["", "### Recorded, and nothing selected by it", "", _ORDER, ""]
            rows = [row[:-1] for row in gate_rows(order)]
            parts.append(_markdown(("part", "measure", "value", "asked", "n"), rows))
    return "\n".join(parts) + "\n"


# Guards ---------------------------------------------------------------------------------------

_BLIND = (
    "Requests of a kind that it was not calibrated on may raise more false alarms than promised: "
    "other languages, long documents, code, another system prompt, another chat template.",
    "Harm that stands nowhere in the user's words is not seen: what a reply adds, what a document "
    "or a tool brings, what an image shows. The assistant's own turns are not read.",
    "Encoded requests (base64, rot13 and the like) are seen only as far as this model reads them; "
    "text unlike any language may also raise an alarm whatever it says.",
    "A request taken apart over several turns, each harmless by itself, is read turn by turn.",
    "Somebody who optimises a text against this very guard gets past it. It says nothing about "
    "what share of attacks it finds.",
    "Quantising, fine-tuning or merging the model moves its activations: calibrate again.",
)


_CLAIMS = (
    (
        "T0",
        "no attack",
        "the gate opens on at most the promised share of benign requests like those "
        "it was calibrated on; while it is closed the reply is the model's own, bit for bit",
    ),
    ("T0d", "text planted so that benign requests are refused", "nothing; openings are measured"),
    (
        "T1",
        "fixed jailbreaks, encodings, many-shot",
        "what `demur anchor evaluate` measures, no more",
    ),
    (
        "T2",
        "a reply that is made to begin with given words",
        "measured: the reply is begun anew in a fresh turn once the gate opens",
    ),
    ("T3", "search by log-probabilities", "measured at its budget; nothing beyond it"),
    ("T4", "search by gradients, gate included", "measured at its budget; expect erosion"),
    ("T5", "soft prompts and embeddings", "nothing"),
    (
        "T6a",
        "tampered weights under a trusted runtime",
        "measured: floors were fitted on the trusted "
        "model; watch the gate for drift, and calibrate anew after changes of your own",
    ),
    (
        "T6b",
        "edits of activations through a trusted interface",
        "measured, and only if the anchor's hooks run last",
    ),
    ("T7", "whoever owns weights and runtime", "nothing: the hooks can be deleted"),
)


def anchor_card(anchor: Anchor) -> str:
    """An anchor's card in Markdown: what it holds, promises, and claims by threat model."""
    about, gate = anchor.about, anchor.gate
    assert gate is not None
    load = about.get("load") or {}
    model = about.get("model") or "a model without a name"
    if about.get("adapter"):
        model += f" + {about['adapter']}"
    settings = about.get("anchor") or {}
    facts = [
        ("model", model),
        ("revision", about.get("revision") or "none pinned"),
        ("data type", about.get("dtype")),
        ("fingerprint", f"`{about.get('fingerprint')}`"),
        ("chat template", f"`{about.get('template')}`"),
        ("system prompt", load.get("system") or "the template's own"),
        ("gate reads", f"{', '.join(gate.reads)} at `{gate.detector.site}`"),
        ("holds", f"`{anchor.actuators[0].site}` to `{anchor.actuators[-1].site}`"),
        ("strength", f"{anchor.strength:g} (1 is the mean of refusing replies)"),
        ("action", anchor.action),
        ("a reply that had begun", "is begun anew" if anchor.fresh_turn else "goes on"),
        (
            "replies learned from",
            ", ".join(f"{n} {k}" for k, n in about.get("replies", {}).items()),
        ),
        ("balanced by harm", "yes" if about.get("balanced_by_harm") else "no: one class alone"),
        ("seed", about.get("seed")),
    ]
    strata = [
        (name, one.n, f"{one.value:.3g}", one.exceeded, "yes" if one == gate.threshold else "")
        for name, one in gate.strata.items()
    ]
    strengths = [
        (f"{row['strength']:g}", f"{row['refused']:.0%}", f"{row['degenerate']:.0%}")
        for row in about.get("strengths", ())
    ]
    replied = any(read.admitted for read in gate.replies)
    life = f"and of {settings.get('reply_tokens')} tokens of reply " if replied else ""
    parts = [
        f"# Anchor for {model}",
        "",
        "Holds the refusal coordinate above a floor once its gate has opened.",
        "",
        _markdown(("", ""), facts),
        "",
        "## What it promises",
        "",
        f"Of benign requests {life}exchangeable with its calibration prompts it opens on at most "
        f"{gate.threshold.alpha:.1%}, on average over calibration sets; for the kind that sets the "
        f"threshold {gate.threshold.value:.3g} below {gate.threshold.bound:.2%} with 95 % "
        "confidence.",
        "",
        _markdown(("benign prompts", "n", "own threshold", "above", "sets it"), strata),
        "",
        "## How its strength was chosen",
        "",
        "Harmful requests to choose by, refusal ablated and the gate forced open; 0 is without the "
        "floor.",
        "",
        _markdown(("strength", "refused", "degenerate"), strengths),
        "",
        "## What is claimed, by threat model",
        "",
        _markdown(("", "attacker", "claim"), list(_CLAIMS)),
        "",
        "## What the gate does not see",
        "",
        *(f"- {line}" for line in _BLIND),
    ]
    return "\n".join(parts) + "\n"


def guard_card(guard: Guard) -> str:
    """A guard's card in Markdown: what it is, what it promises, and what it does not see."""
    about, threshold = guard.about, guard.threshold
    load = about.get("load") or {}
    model = about.get("model") or "a model without a name"
    if about.get("adapter"):
        model += f" + {about['adapter']}"
    facts = [
        ("model", model),
        ("revision", about.get("revision") or "none pinned"),
        ("data type", about.get("dtype")),
        ("fingerprint", f"`{about.get('fingerprint')}`"),
        ("chat template", f"`{about.get('template')}`"),
        ("system prompt", load.get("system") or "the template's own"),
        ("reads", ", ".join(read.name for read in guard.admitted) + f" at `{guard.site}`"),
        ("window", f"{guard.window} tokens, every {guard.stride}"),
        ("seed", about.get("seed")),
    ]
    for part, counts in (about.get("fitted_on") or {}).items():
        what = "fitted on" if part == "fit" else "layer and reads chosen on"
        facts.append((what, f"{counts['harmful']} harmful and {counts['benign']} benign prompts"))
    settings = about.get("settings") or {}
    wrapped = ", ".join(settings.get("wrappers", ())) or "none"
    strata = [
        (name, one.n, f"{one.value:.3g}", one.exceeded, "yes" if one == threshold else "")
        for name, one in guard.strata.items()
    ]
    parts = [
        f"# Guard for {model}",
        "",
        "Tells harmful requests while the model reads them, from the stream of its own prefill.",
        "",
        _markdown(("", ""), facts),
        "",
        "## What it promises",
        "",
        f"Of benign requests exchangeable with its calibration prompts at most "
        f"{threshold.alpha:.1%} lie above the threshold {threshold.value:.3g}, on average over "
        f"calibration sets. For the kind that sets it (n = {threshold.n}, {threshold.exceeded} "
        f"above) the share is below {threshold.bound:.2%} with 95 % confidence over calibration "
        "sets.",
        "",
        _markdown(("benign prompts", "n", "own threshold", "above", "sets it"), strata),
        "",
        "## What it was fitted on",
        "",
        f"Harmful: {settings.get('harmful')}. Benign: {settings.get('benign')}.",
        "",
        f"Wrappers around both classes: {wrapped}; the last two only chose among layers and reads.",
        "",
        "## What it does not see",
        "",
        *(f"- {line}" for line in _BLIND),
    ]
    return "\n".join(parts) + "\n"
