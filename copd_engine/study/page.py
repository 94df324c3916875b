"""The page of a study: one self-contained HTML file, the same as Markdown with its figures beside it.

Every number and verdict on it is computed here from the run folders; none is written in a template.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from copd_engine.study.claims import measure_claims
from copd_engine.study.config import PILOT, StudyConfig
from copd_engine.study.figures import Picture, draw_study
from copd_engine.study.plan import Unit, fingerprint, units_of
from copd_engine.study.results import Results
from copd_engine.study.run import spent
from copd_engine.study.tables import Table, accuracy_table, claims_table, pilot_table

HTML, MARKDOWN = "study.html", "study.md"


@dataclass(frozen=True)
class Page:
    """Everything that is shown."""

    title: str
    facts: list[tuple[str, str]]
    missing: list[str]
    tables: list[Table]
    pictures: list[Picture]
    config_text: str


def write_page(
    study: StudyConfig,
    command: str,
    errors: Mapping[str, str],
    markdown: Path | None = None,
    fast: bool = False,
) -> Path:
    """Write ``study.html``, ``study.md`` and ``figures/*.png`` into the study's folder; returns the path of the HTML.

    ``errors``: unit -> why it failed. ``markdown``: a second copy of the Markdown page, its figures in a folder of the
    same stem beside it. UserError where a table or a claim names a model that no run has.
    """
    page = _page(study, command, errors, fast)
    root = Results(study).root
    _write_markdown(page, root / MARKDOWN, "figures")
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        _write_markdown(page, markdown, markdown.stem)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("copd_engine.study", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = {p.key: f"data:image/png;base64,{base64.b64encode(p.png).decode()}" for p in page.pictures}
    text = environment.get_template("study.html").render(page=page, images=images)
    (root / HTML).write_text(text, encoding="utf-8")
    return root / HTML


def _page(study: StudyConfig, command: str, errors: Mapping[str, str], fast: bool) -> Page:
    results = Results(study, fast)
    claims = measure_claims(study, results)
    tables = [claims_table(claims)] if claims else []
    tables += [accuracy_table(table, results) for table in study.tables]
    pilots = [seed for seed in study.seeds if (PILOT, seed) in results.finished]
    if pilots:
        tables.append(pilot_table(results, pilots))
    units = units_of(study, fast)
    missing = [
        f"{unit.name}: {errors.get(unit.name, 'not finished')}"
        for unit in units
        if (unit.variant, unit.seed) not in results.finished
    ]
    facts = _facts(study, command, fast, results, units, len(units) - len(missing))
    config = yaml.safe_dump(study.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    return Page(f"Study {study.name}", facts, missing, tables, draw_study(study, results), config)


def _facts(
    study: StudyConfig, command: str, fast: bool, results: Results, units: Sequence[Unit], num_finished: int
) -> list[tuple[str, str]]:
    took = spent(results.root)
    killed = f", killed {took.num_killed} times (counted until the last unit before)" if took.num_killed else ""
    started = "started once" if took.num_sessions == 1 else f"started {took.num_sessions} times"
    found = [results.result(variant, seed) for variant, seed in sorted(results.finished)]
    versions = [f"{name} {version}" for result in found for name, version in result.get("versions", {}).items()]
    facts = [
        ("Command", command),
        ("Config, SHA-256", fingerprint(study, fast)),
        ("Seeds", ", ".join(map(str, study.seeds))),
        ("Units finished", f"{num_finished} of {len(units)}"),
        ("Machine", _distinct(result["machine"] for result in found)),
        ("Date", _distinct(sorted(result["date"] for result in found))),
        ("Versions", _distinct(versions)),
        ("CoPD's topology", _topologies(units)),
        ("Wall time", f"{duration(took.wall_s)}, {started}{killed}"),
        ("CPU time", f"{duration(took.cpu_s)}, {study.processes} processes side by side"),
    ]
    return [(label, value) for label, value in facts if value]


def _topologies(units: Sequence[Unit]) -> str:
    """By topology, the variants that train by it; of two branches all but a list of edges are one and the same."""
    variants: dict[str, dict[str, None]] = {}
    for unit in units:
        if unit.variant == PILOT or unit.config.method != "copd" or len(unit.config.branches) < 2:
            continue
        schedule = unit.config.schedule
        if not isinstance(schedule.topology, str):
            shown = ", ".join(f"{teacher} → {student}" for student, teacher in schedule.topology) or "none"
        elif len(unit.config.branches) == 2:
            shown = "both ways (two branches)"
        else:
            hub = f" ({schedule.hub or unit.config.branch_names[0]})" if schedule.topology == "hub" else ""
            shown = schedule.topology + hub
        variants.setdefault(shown, {})[unit.variant] = None
    return "; ".join(f"{topology}: {', '.join(names)}" for topology, names in variants.items())


def _distinct(values: Any) -> str:
    return ", ".join(dict.fromkeys(values))


def duration(seconds: float) -> str:
    """From an hour and a half on in hours and minutes."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def _write_markdown(page: Page, file: Path, figures: str) -> None:
    folder = file.parent / figures
    folder.mkdir(parents=True, exist_ok=True)
    for picture in page.pictures:
        (folder / f"{picture.key}.png").write_bytes(picture.png)
    lines = [f"# {page.title}", "", *_facts_lines(page.facts), ""]
    if page.missing:
        lines += ["## Missing", "", *(f"- {html.escape(line, quote=False)}" for line in page.missing), ""]
    for table in page.tables:
        lines += [f"## {table.title}", "", *([table.note, ""] if table.note else []), table.markdown(), ""]
    if page.pictures:
        lines += ["## Figures", ""]
    for picture in page.pictures:
        lines += [f"![{picture.title}]({figures}/{picture.key}.png)", "", f"{picture.title}. {picture.caption}", ""]
    lines += ["## Config", "", "```yaml", page.config_text.rstrip(), "```", ""]
    file.write_text("\n".join(lines), encoding="utf-8")


def _facts_lines(facts: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {label} | {_cell(label, value)} |" for label, value in facts)]


def _cell(label: str, value: str) -> str:
    value = value.replace("|", "\\|")
    return f"`{value}`" if label in ("Command", "Config, SHA-256") else value
