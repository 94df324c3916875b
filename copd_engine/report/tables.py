"""The tables of a report: the result, the phases, the diagnostics of every pair, and the time of each part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from copd_engine.report.run import (
    METHOD_NAMES,
    Run,
    distinct,
    nested,
    phase_changes,
    planned_steps,
    time_by_part,
)

KINDS = ("base", "expert", "baseline", "branch", "merged")
MATRICES = (
    ("overlap", "Top-k overlap", "{:.3f}"),
    ("sum_min", "Σ min(p, q)", "{:.4f}"),
    ("symmetric_kl", "Symmetric KL", "{:.2e}"),
    ("kl_student_teacher", "KL(student‖teacher)", "{:.2e}"),
    ("task_cosine", "Cosine of the changes since the base", "{:.3f}"),
    ("update_cosine", "Cosine of the changes since the diagnostics before", "{:.3f}"),
)
#: What a model's training took: key of the row, head of the column, and the number's form.
COSTS = (("steps", "steps", "{:,}"), ("rollouts", "rollouts", "{:,}"), ("train_flops", "FLOPs", "{:.2e}"))


@dataclass(frozen=True)
class Cell:
    """``text`` is a percentage; ``best`` where no other row shows a higher one."""

    text: str
    stderr: str
    best: bool


@dataclass(frozen=True)
class Row:
    model: str
    kind: str
    cells: list[Cell]
    costs: list[str]


def cost_heads(result: dict[str, Any]) -> list[str]:
    """Heads of the columns of :data:`COSTS`; a result of an older version has only some of them."""
    return [head for key, head, _ in COSTS if key == "rollouts" or any(row.get(key) for row in result["rows"])]


def result_rows(result: dict[str, Any]) -> tuple[list[str], list[Row]]:
    """Column names (domains, then "average") and rows in the order base, experts, baselines, branches, merged."""
    heads = cost_heads(result)
    columns = [*(result.get("domains") or []), "average"]
    rows = sorted(result["rows"], key=lambda row: KINDS.index(row["kind"]) if row.get("kind") in KINDS else len(KINDS))
    texts = [[_percent(nested(row, "accuracy", column)) for column in columns] for row in rows]
    best = [max((float(line[c]) for line in texts if line[c] != "-"), default=math.nan) for c in range(len(columns))]
    out = []
    for row, line in zip(rows, texts, strict=True):
        cells = [
            Cell(text, _percent(nested(row, "stderr", column), none=""), text != "-" and float(text) == top)
            for text, column, top in zip(line, columns, best, strict=True)
        ]
        costs = [
            "-" if row.get(key) is None else form.format(row[key] if key == "train_flops" else int(row[key]))
            for key, head, form in COSTS
            if head in heads
        ]
        out.append(Row(str(row.get("model", "?")), str(row.get("kind", "")), cells, costs))
    return columns, out


def result_table(result: dict[str, Any]) -> str:
    """The result as plain text: accuracy in percent ± standard error, ``*`` at the best of each column."""
    columns, rows = result_rows(result)

    def text(cell: Cell) -> str:
        return cell.text + (f" ±{cell.stderr:>4}" if cell.stderr else "") + ("*" if cell.best else " ")

    lines = [["model", *(f"{column} " for column in columns), *cost_heads(result)]]
    lines += [[row.model, *map(text, row.cells), *row.costs] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    printed = []
    for model, *numbers in lines:
        aligned = [word.rjust(width) for word, width in zip(numbers, widths[1:], strict=True)]
        printed.append("  ".join([model.ljust(widths[0]), *aligned]))
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    out = [printed[0]]
    for position, row in enumerate(rows):
        if position == 0 or row.kind != rows[position - 1].kind:
            out.append(rule)
        out.append(printed[position + 1])
    return "\n".join([*out, rule, f"accuracy in % ± standard error{prompts_note(result)}; * best of the column"])


def markdown_table(result: dict[str, Any]) -> str:
    """The result for a README: accuracy in percent ± standard error, the best of each column in bold."""
    columns, rows = result_rows(result)

    def text(cell: Cell) -> str:
        number = f"**{cell.text}**" if cell.best else cell.text
        return f"{number} ± {cell.stderr}" if cell.stderr else number

    heads = ["model", *columns, *cost_heads(result)]
    lines = [heads, ["---", *("---:" for _ in heads[1:])]]
    lines += [[row.model.replace("|", "\\|"), *map(text, row.cells), *row.costs] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _percent(value: Any, none: str = "-") -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) else none


def prompts_note(result: dict[str, Any]) -> str:
    counts = {row["num_prompts"] for row in result["rows"] if row.get("num_prompts")}
    if not counts:
        return ""
    return f", {'-'.join(str(n) for n in sorted({min(counts), max(counts)}))} held-out prompts per domain"


def headline(run: Run) -> str:
    """One line: the method, and what came out."""
    name = METHOD_NAMES.get(run.method, run.method)
    name = name[0].upper() + name[1:]
    rows = (run.result or {}).get("rows", [])
    averages = {row.get("kind"): nested(row, "accuracy", "average") for row in rows}
    of_experts = next((nested(r, "accuracy", "average") for r in rows if r.get("model") == "average of experts"), None)
    if run.method != "copd" and (own := next((row for row in rows if row.get("kind") == "baseline"), None)):
        return f"{name}: {own['model']} {_percent(nested(own, 'accuracy', 'average'))} %  (held-out accuracy)"
    if averages.get("merged") is None:
        planned = planned_steps(run.config)
        return f"{name}: step {run.last_step}" + (f" of {planned}" if planned else "")
    parts = [f"{name}: merged {_percent(averages['merged'])} %"]
    parts += [f"average of independent experts {_percent(of_experts)} %"] if of_experts is not None else []
    parts += [f"base {_percent(averages['base'])} %"] if averages.get("base") is not None else []
    return " · ".join(parts) + "  (held-out accuracy)"


def change_rows(run: Run) -> list[dict[str, Any]]:
    """The table of phases: where each diagnostic stood before and after, mean over pairs."""
    rows = []
    shown = MATRICES[:3]
    for change in phase_changes(run.records, [key for key, _, _ in shown]):
        cells = []
        for key, _, form in shown:
            before, after = change.before[key], change.after[key]
            known = before is not None and after is not None
            cells.append(f"{form.format(before)} → {form.format(after)}" if known else "-")
        span = change.span
        phase = {"rl": "I (RL)", "opd": "II (OPD)"}.get(span.phase, span.phase)
        steps = f"{span.first_step}-{span.last_step}"
        rows.append({"cycle": span.cycle, "phase": phase, "opd": span.phase == "opd", "steps": steps, "cells": cells})
    return rows


def matrices(run: Run) -> dict[str, Any] | None:
    """K x K tables at the last diagnostics; rows are students, columns teachers and the base."""
    last = next((r for r in reversed(run.records) if any(nested(r, "diagnostics", k) for k in ("pairs", "base"))), None)
    if last is None:
        return None
    to_base = last["diagnostics"].get("base") or []
    rows_of_pairs = [*(last["diagnostics"].get("pairs") or []), *to_base]
    pairs = {(p.get("student"), p.get("teacher")): p for p in rows_of_pairs}
    found = distinct(student for student, _ in pairs)
    names = [*(b for b in run.branches if b in found), *(name for name in found if name not in run.branches)]
    teachers = [*names, *(["base"] if to_base else [])]
    tables = []
    for key, title, form in MATRICES:
        known = [p[key] for p in pairs.values() if isinstance(p.get(key), int | float)]
        if not known:
            continue
        low, width = min(known), (max(known) - min(known)) or 1.0
        rows = []
        for student in names:
            values = [nested(pairs.get((student, teacher)), key) for teacher in teachers]
            cells = [("-", 0.0) if v is None else (form.format(v), round((v - low) / width, 3)) for v in values]
            rows.append((student, cells))
        tables.append({"title": title, "rows": rows})
    return {"step": last["step"], "names": teachers, "tables": tables}


def time_rows(run: Run) -> list[tuple[str, str, str]]:
    records = [record for record in run.records if record["step"] >= 1]
    parts = time_by_part(records)
    total = sum(part.sum() for part in parts.values()) or 1.0
    return [(name, f"{part.mean():.3f}", f"{100 * part.sum() / total:.1f} %") for name, part in parts.items()]
