"""What a study compares when its config only lists methods: variants, table, figures and claims for any branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copd_engine.config import DiagnosticsConfig

METHODS = ("copd", "mixed", "mopd", "static_opd", "expert")


def expand_methods(run: Mapping[str, Any], methods: list[str]) -> dict[str, Any]:
    """The sections of a study of ``methods`` on the ``branches`` of ``run``, a list of mappings with names.

    ``static_opd`` is one variant per student: the first branch learns from the second, every other one from the first,
    as on the edges of the paper's hub. It and ``mopd`` take the experts of ``expert``, which is trained once, asked for
    or not. Under ``model.lora`` a finished run has no adapters to go on with: they train experts of their own.
    """
    names = [str(branch["name"]) for branch in run["branches"]]
    methods = list(dict.fromkeys(methods))
    variants: dict[str, Any] = {}
    rows: dict[str, str] = {}
    has_adapters = (run.get("model") or {}).get("lora") is not None
    taken = {} if has_adapters else {"experts": "expert"}
    needs_experts = {"expert", *(() if has_adapters else ("mopd", "static_opd"))} & set(methods)
    if needs_experts:
        variants["expert"] = {"changes": {"method": "expert"}}
        rows["base"] = "expert/base"
        rows |= {f"{name} expert, alone": f"expert/expert:{name}" for name in names}
        if len(names) > 1:
            rows["average of the experts"] = "expert"
    if "mixed" in methods:
        variants["mixed"] = {"changes": {"method": "mixed"}}
        rows["mixed RLVR"] = "mixed"
    if "static_opd" in methods and len(names) > 1:
        for student in names:
            teacher = names[1] if student == names[0] else names[0]
            variant = f"static_opd_{student}"
            changes = {"method": "static_opd", "static_opd": {"student": student, "teacher": teacher}}
            variants[variant] = {"changes": changes, **taken}
            rows[f"static OPD, {teacher} → {student}"] = variant
    if "mopd" in methods and len(names) > 1:
        variants["mopd"] = {"changes": {"method": "mopd"}, **taken}
        rows["MOPD"] = "mopd"
    sections: dict[str, Any] = {"variants": variants, "tables": [{"title": "Accuracy", "rows": rows}]}
    if "copd" in methods:
        variants["copd"] = {"changes": {"method": "copd"}}
        rows.setdefault("base", "copd/base")
        claims, steps = _of_copd(names, rows, bool(needs_experts), _top_k(run))
        sections |= {"claims": claims, "steps": steps}
        rows |= {f"CoPD, {name} branch": f"copd/branch:{name}" for name in names}
        if len(names) > 1:
            rows["CoPD, merged"] = "copd"
    return sections


def _top_k(run: Mapping[str, Any]) -> Any:
    diagnostics = run.get("diagnostics")
    given = diagnostics.get("top_k") if isinstance(diagnostics, dict) else None
    return DiagnosticsConfig().top_k if given is None else given


def _of_copd(
    names: list[str], others: dict[str, str], experts: bool, top_k: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Claims and figures about CoPD: above every other method and above the experts on their own domains, and its
    phases. ``others``: label -> model of the rows without CoPD's. A lone branch has nothing to be merged with: it
    stands for CoPD, and there is no overlap."""
    copd = "copd" if len(names) > 1 else f"copd/branch:{names[0]}"
    claims: list[dict[str, Any]] = [
        {"claim": f"CoPD is above {_with_article(label)}", "better": copd, "than": model}
        for label, model in others.items()
        if "/" not in model
    ]
    if experts:
        claims += [
            {
                "claim": f"CoPD is above the {n} expert on {n}",
                "better": copd,
                "than": f"expert/expert:{n}",
                "domain": n,
            }
            for n in names
        ]
    if len(names) < 2:
        return claims, []
    overlap = {"variant": "copd", "measure": "overlap"}
    claims += [
        {"claim": "Overlap falls in phase I", "kind": "phase", **overlap, "phase": "rl", "direction": "falls"},
        {"claim": "Overlap rises in phase II", "kind": "phase", **overlap, "phase": "opd", "direction": "rises"},
        {"claim": f"Overlap (k = {top_k}) stays above 0.90", "kind": "stays_above", **overlap, "level": 0.9},
    ]
    lines = {"CoPD": "copd"}
    if experts:
        lines["independent experts"] = "expert"
        above = "Overlap is above that of independent experts"
        claims.append({"claim": above, "kind": "above", **overlap, "than": "expert"})
    steps = [
        {"title": "Top-k overlap", "measure": "overlap", "lines": lines},
        {"title": "Symmetric KL", "measure": "symmetric_kl", "lines": lines},
    ]
    return claims, steps


def _with_article(label: str) -> str:
    return f"the {label}" if label.startswith("average") else label
