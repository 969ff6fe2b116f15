"""The Markdown card of an export, in the layout of model cards on the hub.

It says what is known and what is not: figures come from an audit with interval and n, and without
one it says "not measured".

References:
    Mitchell et al. 2019, arXiv:1810.03993 (model cards).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demur.errors import StoreError
from demur.notebook import readable
from demur.results import AuditResults, Leg, read_results

_HUB = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
# A card is read on pages that make links, images and elements of it, and names and recipes may come
# from a stranger's file.
_LINK = re.compile(r"\](?=[(\[])")
_RELATION = {"peft": "adapter", "merged": "finetune"}


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What an audit measured of the direction.

    Attributes:
        run: The run folder.
        results: Its results.
    """

    run: Path
    results: AuditResults

    @classmethod
    def of(cls, run: Path) -> Evidence:
        """Read a run folder; errors are those of `read_results`."""
        return cls(Path(run), read_results(Path(run)))

    def belongs_to(self, about: Mapping[str, Any]) -> None:
        """See that the audit is of this model and of the direction that is exported.

        Raises:
            StoreError: It is of others.
        """
        own, direction = self.results.model, self.results.direction
        if own.fingerprint != about["fingerprint"]:
            raise StoreError(
                f"{self.run} audited {own.name} ({own.fingerprint[:12]}), not {about['model']} as "
                f"it is loaded now ({str(about['fingerprint'])[:12]})",
                "name the audit of this model, or leave `--audit` out",
            )
        for act in about["acts"]:
            place = (act["site"], act["position"])
            near = abs(float(act["norm"]) - direction.norm) <= 1e-4 * direction.norm
            if place != (direction.site, direction.position) or not near:
                raise StoreError(
                    f"{self.run} audited the direction at {direction.site}, position "
                    f"{direction.position}, length {direction.norm:.4g}; exported is one at "
                    f"{place[0]}, position {place[1]}, length {act['norm']:.4g}",
                    "name the audit of this direction, or leave `--audit` out",
                )

    def record(self) -> dict[str, Any]:
        """What the record keeps of it."""
        return {
            "run": self.run.name,
            "usable": self.results.verdict.usable,
            "headline": self.results.verdict.headline,
        }


def plain(text: object) -> str:
    """Foreign text as one line of Markdown that makes no element, link or image."""
    line = readable(" ".join(str(text).split()))
    return _LINK.sub(r"]\\", line.replace("&", "&amp;").replace("<", "&lt;"))


def _code(text: object) -> str:
    """Foreign text between backticks, which it cannot end."""
    return f"`{readable(' '.join(str(text).split())).replace('`', chr(39))}`"


def card(about: Mapping[str, Any], *, use: str, evidence: Evidence | None) -> str:
    """The card in Markdown, with YAML in front.

    Args:
        about: The record of the export.
        use: How its consumer loads it.
        evidence: The audit; None: nothing was measured.
    """
    parts = [_front(about), "", f"# {_title(about)}", ""]
    if warning := _warning(about):
        parts += [f"> **Warning.** {warning}", ""]
    parts += [
        _what(about),
        "",
        "## Made from",
        "",
        _table(("", ""), _facts(about)),
        "",
        "## Use",
        "",
        use,
        "",
        "## How exact it is",
        "",
    ]
    losses: Mapping[str, str] = about["losses"]
    if losses:
        parts += ["Not the intervention it was made from. Lost, on request:", ""]
        parts += [f"- {_code(name)}: {plain(what)}." for name, what in losses.items()]
    else:
        parts.append(f"{about['exact'][0].upper()}{about['exact'][1:]}.")
    parts += [f"\n{plain(note[0].upper() + note[1:])}." for note in about.get("notes", ())]
    parts += [
        "",
        "## Evidence",
        "",
        *_evidence(about, evidence),
        "",
        "## Limits",
        "",
        *_limits(about),
    ]
    return "\n".join(parts) + "\n"


def _front(about: Mapping[str, Any]) -> str:
    """YAML that the hub reads; JSON strings are YAML strings."""
    lines = ["---"]
    name = str(about["model"])
    base = _HUB.get(name, name)
    if not Path(base).is_absolute() and base.count("/") == 1 and not Path(base).exists():
        lines.append(f"base_model: {json.dumps(base)}")
        if relation := _RELATION.get(about["kind"]):
            lines.append(f"base_model_relation: {relation}")
    lines += ["library_name: demur", "tags:"]
    edits = sorted({str(act["act"]) for act in about["acts"]})
    for tag in ("demur", "refusal-direction", "steering", *edits, about["kind"]):
        lines.append(f"- {tag}")
    return "\n".join([*lines, "---"])


def _title(about: Mapping[str, Any]) -> str:
    verbs = {"ablate": "ablated", "add": "added", "project-to-mean": "held at a level"}
    what = verbs[about["acts"][0]["act"]]
    if what == "added" and all(act["strength"] < 0 for act in about["acts"]):
        what = "subtracted"
    return f"{plain(about['model'])}: refusal direction, {what} ({about['kind']})"


def removes_refusal(about: Mapping[str, Any]) -> bool:
    """Whether the edit takes refusal away: ablation, a held level, or subtraction."""
    return any(act["act"] != "add" or act["strength"] < 0 for act in about["acts"])


def _warning(about: Mapping[str, Any]) -> str | None:
    if not removes_refusal(about):
        return None
    return (
        "This edit weakens or removes the model's refusal of harmful requests. It is meant for "
        "research on refusal and for testing defences; do not put it in front of users without "
        "another safeguard, and keep to the licence of the base model."
    )


def _what(about: Mapping[str, Any]) -> str:
    lines = []
    for act in about["acts"]:
        site = _code(act["site"])
        read = f"read at {site}, token {act['position']} from the end"
        if act["act"] == "ablate":
            lines.append(f"Directional ablation of a direction {read}, at every write.")
        elif act["act"] == "add":
            lines.append(
                f"Addition of {act['strength']:g} times a direction of length {act['norm']:.4g}, "
                f"{read}, at {site}."
            )
        else:
            lines.append(
                f"The coordinate along a direction {read} is set to {act['level']:.4g} at "
                f"{_code(act['at'])} (strength {act['strength']:g})."
            )
    where = ", ".join(about["where"])
    lines.append(f"It acts on {where or 'every'} token{'s' if where else ''}.")
    return " ".join(lines)


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("model", str(about["model"])),
        ("revision", str(about["revision"] or "none pinned")),
        ("adapter, merged", str(about["adapter"] or "none")),
        ("data type", str(about["dtype"])),
        ("fingerprint of the weights", _code(about["fingerprint"])),
        ("chat template", _code(about["template_hash"])),
        ("tied embeddings", "yes" if about["tied"] else "no"),
        ("convention", str(about["convention"])),
        ("sign", str(about["sign"])),
    ]
    rows += [("made on another model", note) for note in about.get("borrowed", ())]
    rows += [("recipe", _code(act["recipe"])) for act in about["acts"][:1]]
    return [*rows, ("demur", str(about["demur"]))]


def _evidence(about: Mapping[str, Any], evidence: Evidence | None) -> list[str]:
    if evidence is None:
        return [
            "Not measured: no audit was given. Whether this direction carries refusal, what the "
            "edit costs elsewhere, and whether a random direction would do the same is not known "
            "from this card."
        ]
    found = evidence.results
    direction = found.direction
    rows: list[tuple[str, str]] = [
        ("refused before, harmful", str(found.baseline_harmful)),
        ("refused before, harmless", str(found.baseline_harmless)),
        ("AUROC, harmful against harmless", str(direction.auroc)),
        ("cosine under resampling", str(direction.bootstrap_cosine)),
    ]
    edits = _edits_of(about)
    for leg in found.legs:
        if leg.family == "direction" and leg.measure == "refused" and leg.edit in edits:
            rows.append((f"{leg.edit}: refused, {leg.on}", f"{leg.after}; change {leg.change}"))
    random = _randoms(found.legs, edits)
    if random:
        rows.append(("random directions beside it: change of refused", random))
    for cost in found.edits:
        if cost.edit.split()[0] in edits:
            rows.append((f"KL on harmless prompts, {cost.edit}, nats", str(cost.kl)))
            if cost.perplexity_ratio is not None:
                rows.append((f"perplexity ratio, {cost.edit}", str(cost.perplexity_ratio)))
    lines = [
        f"From `demur audit` (run {_code(evidence.run.name)}, judge {_code(found.judge.name)}, "
        f"seed {found.seed}), on prompts that the direction was not fitted on.",
        "",
        f"Verdict: **{plain(found.verdict.headline)}**",
        "",
        *(f"- {plain(reason)}" for reason in found.verdict.reasons),
        "",
        _table(("measure", "value [95 % interval], n, method"), rows),
    ]
    strengths = {abs(act["strength"]) for act in about["acts"] if act["act"] == "add"}
    if strengths - {1.0}:
        shown = ", ".join(f"{one:g}" for one in sorted(strengths))
        lines += ["", f"The audit added at strength 1; at {shown} it was not measured."]
    if not edits:
        lines += ["", "The audit did not measure this kind of edit."]
    if about["losses"]:
        lines += ["", "The audit measured the intervention as it was, not what is left of it here."]
    elif about["where"]:
        lines += ["", "The audit edited every token; limited to some it was not measured."]
    return lines


def _edits_of(about: Mapping[str, Any]) -> set[str]:
    names = set()
    for act in about["acts"]:
        if act["act"] == "ablate":
            names.add("ablate")
        elif act["act"] == "add":
            names.add("add" if act["strength"] > 0 else "subtract")
    return names


def _randoms(legs: Sequence[Leg], edits: set[str]) -> str:
    found = [
        f"{leg.arm} {leg.change}"
        for leg in legs
        if leg.family not in ("direction", "other")
        and leg.measure == "refused"
        and leg.edit in edits
    ]
    return "; ".join(found)


def _limits(about: Mapping[str, Any]) -> list[str]:
    lines = [
        "- For the weights, data type and chat template above alone; `demur.exports.read_export` "
        "refuses others, other tools do not look.",
        "- One direction is not all of refusal: other directions, longer conversations, other "
        "languages and other templates may behave otherwise.",
    ]
    if not removes_refusal(about):
        lines.append("- Addition raises refusal of harmless requests as well.")
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        # Code shows what stands in it as it is.
        own = text if text.startswith("`") else plain(text)
        return own.replace("|", "\\|")

    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)
