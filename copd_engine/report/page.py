"""The report of a run: ``report.html`` (one file, nothing fetched), ``report.png`` and ``figures/*.png``."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path
from typing import Any, Literal

import jinja2
from PIL import Image

from copd_engine.report.curves import branch_color
from copd_engine.report.figures import draw_combined, draw_figures
from copd_engine.report.retention import HEADER, retention, retention_note, with_scores
from copd_engine.report.run import METHOD_NAMES, Run, distinct, load_run, planned_steps
from copd_engine.report.tables import (
    KINDS,
    change_rows,
    cost_heads,
    headline,
    matrices,
    prompts_note,
    result_rows,
    time_rows,
)

SAMPLES_PER_BRANCH = 6
RIGHT_REWARD = 0.99  # verifiers with partial credit pay small change for junk


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html``, ``report.png`` and ``figures/*.png`` into the run folder; returns the path of the HTML.

    Raises :class:`UserError` where there is no run folder, no metrics, or a file that cannot be read.
    """
    run = load_run(run_dir)
    figures = draw_figures(run)
    (run.dir / "figures").mkdir(exist_ok=True)
    for panel, png in figures:
        (run.dir / "figures" / f"{panel.key}.png").write_bytes(png)
    (run.dir / "report.png").write_bytes(draw_combined(run, headline(run)))

    sections: dict[str, list[dict[str, str]]] = {}
    for panel, png in figures:
        figure = {"title": panel.title, "caption": panel.caption, "src": _data_uri(png)}
        sections.setdefault(panel.section, []).append(figure)
    columns, rows = result_rows(run.result) if run.result else ([], [])
    kept = retention(with_scores(run.result, run.dir)) if run.result else []
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("copd_engine.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html").render(
        headline=headline(run),
        name=run.config.get("name") or run.dir.resolve().name,
        facts=_facts(run),
        missing=run.missing,
        columns=columns,
        cost_heads=cost_heads(run.result) if run.result else [],
        groups=[(_kind_name(kind, run.method), list(rows)) for kind, rows in itertools.groupby(rows, lambda r: r.kind)],
        prompts_note=prompts_note(run.result) if run.result else "",
        kept={"header": HEADER, "rows": [row.cells for row in kept], "note": retention_note(kept)} if kept else None,
        sections=sections,
        changes=change_rows(run),
        matrices=matrices(run),
        times=time_rows(run),
        samples=_sample_views(run),
        versions=(run.result or {}).get("versions") or {},
        config_text=run.config_text,
    )
    path = run.dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _kind_name(kind: str, method: str) -> str:
    branches = "CoPD branches" if method == "copd" else "Branches"
    names = ("Base", "Independent experts", "Baselines", branches, "Merged")
    return dict(zip(KINDS, names, strict=True)).get(kind, kind)


def _facts(run: Run) -> list[tuple[str, str]]:
    """What stands under the title: label and value."""
    result = run.result or {}
    planned = planned_steps(run.config)
    num_skipped = sum(bool(b.get("skipped")) for r in run.records for b in (r.get("branches") or {}).values() if b)
    seconds = result.get("train_s") or max((r.get("elapsed_s") or 0.0 for r in run.records), default=0.0)
    steps = f"{run.last_step}" + (f" of {planned}" if planned and planned != run.last_step else "")
    peak = result.get("peak_rss_bytes")
    facts = [
        ("Method", METHOD_NAMES.get(run.method, run.method)),
        ("Seed", result.get("seed", run.config.get("seed"))),
        ("Date", result.get("date")),
        ("Machine", result.get("machine")),
        ("Command", result.get("command")),
        ("Optimizer steps", steps + (f" ({num_skipped} branch updates skipped)" if num_skipped else "")),
        ("Training time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s" if seconds else None),
        ("Peak resident memory", f"{peak / 2**30:.2f} GiB" if peak else None),
    ]
    return [(label, str(value)) for label, value in facts if value is not None]


def _sample_views(run: Run) -> list[dict[str, Any]]:
    """The newest samples of each branch, their pictures embedded."""
    views = []
    newest = sorted(run.samples, key=lambda sample: -(sample.get("step") or 0))
    order = distinct([*run.branches, *(sample.get("branch") for sample in newest)])
    for branch in order:
        for sample in [s for s in newest if s.get("branch") == branch][:SAMPLES_PER_BRANCH]:
            reward = sample.get("reward")
            graded: Literal["right", "wrong", ""] = ""
            if isinstance(reward, int | float):
                graded = "right" if reward >= RIGHT_REWARD else "wrong"
            media = [_embed(run.dir, str(path)) for path in sample.get("media") or []]
            shown = {key: sample.get(key, "") for key in ("step", "domain", "prompt", "response", "answer", "reward")}
            view = {"branch": branch, "color": branch_color(run, branch), "graded": graded, "media": media}
            views.append({**shown, **view})
    return views


def _embed(run_dir: Path, relative: str) -> dict[str, Any]:
    """A sample's picture as PNG data, at most 640 pixels wide; ``src`` is None where it cannot be read."""
    path = (run_dir / relative).resolve()
    if not path.is_relative_to(run_dir.resolve()):  # a report must not carry files from outside its run
        return {"name": relative, "src": None}
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except OSError:
        return {"name": relative, "src": None}
    picture.thumbnail((640, 640))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    # Testbed pictures are a few dozen pixels wide: shown enlarged by a whole factor, pixel by pixel.
    factor = max(1, min(8, 320 // max(1, picture.width), 200 // max(1, picture.height)))
    return {"name": relative, "src": _data_uri(buffer.getvalue()), "width": picture.width * factor, "small": factor > 1}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
