"""The table of the paper: models in rows, benchmarks in columns, by domain, with averages; as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from copd_engine.evaluation.results import DOMAINS, BenchmarkScores, Unpaired, averages, differences, unpaired
from copd_engine.evaluation.scores import Interval, bootstrap, mean_at_n, pass_at_k, powers_up_to

Scores = Mapping[str, Sequence[BenchmarkScores]]


def markdown(models: Scores, seed: int) -> str:
    """mean@n of every model in the paper's layout, then pass@k and maj@n, then differences to the first model.

    ``models``: name to the scores of its benchmarks. A model without some benchmark has no average over it.
    """
    parts = [_overview(models, seed), *(_details(name, scores, seed) for name, scores in models.items())]
    if len(models) > 1:
        parts.append(_differences(models, seed))
    return "\n\n".join(parts)


def _overview(models: Scores, seed: int) -> str:
    columns = _columns(models)
    rows = []
    for model, scores in models.items():
        by_name = {score.name: score for score in scores}
        means = averages(scores, seed) if len(by_name) == sum(kind == "benchmark" for kind, *_ in columns) else {}
        row: list[Interval | None] = []
        for kind, name, _ in columns:
            if kind == "average":
                row.append(means.get(name))
            else:
                row.append(bootstrap(mean_at_n(by_name[name].rewards_PG), seed) if name in by_name else None)
        rows.append((model, row))
    best = [
        max((x.value for x in column if x is not None), default=None)
        for column in zip(*(r for _, r in rows), strict=True)
    ]
    lines = [["model", *(title for _, _, title in columns)], ["---", *["---:"] * len(columns)]]
    for model, row in rows:
        cells = [
            _cell(x, bold=len(rows) > 1 and x is not None and x.value == b) for x, b in zip(row, best, strict=True)
        ]
        lines.append([model, *cells])
    counts = {score.rewards_PG.shape[1] for scores in models.values() for score in scores}
    note = f"mean@{'/'.join(map(str, sorted(counts)))} in % (95 % bootstrap interval over prompts)"
    note += "; overall is the mean over the benchmarks." if columns[-1][1] == "overall" else "."
    return f"{_table(lines)}\n\n{note}"


def _columns(models: Scores) -> list[tuple[str, str, str]]:
    """(benchmark or average, name, title): by domain, each with its average where it has several benchmarks."""
    known: dict[str, BenchmarkScores] = {}
    for scores in models.values():
        for score in scores:
            known.setdefault(score.name, score)
    columns = []
    for domain in DOMAINS:
        own = [score for score in known.values() if score.domain == domain]
        columns += [("benchmark", score.name, score.title) for score in own]
        if len(own) > 1:
            columns.append(("average", domain, f"{domain} average"))
    return [*columns, ("average", "overall", "overall")] if len(known) > 1 else columns


def _details(model: str, scores: Sequence[BenchmarkScores], seed: int) -> str:
    powers = sorted({k for score in scores for k in powers_up_to(score.rewards_PG.shape[1])})
    head = ["benchmark", "prompts", *(f"pass@{k}" for k in powers), "maj@n", "cut at the limit", "tokens"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for score in scores:
        num_samples = score.rewards_PG.shape[1]
        passes = [_cell(bootstrap(pass_at_k(score.rewards_PG, k), seed)) if k <= num_samples else "-" for k in powers]
        cut, tokens = f"{100 * score.truncated:.1f} %", f"{score.num_tokens:,.0f}"
        majority = _cell(bootstrap(score.majority_P, seed))
        lines.append([score.title, f"{len(score.units):,}", *passes, majority, cut, tokens])
    return "\n\n".join([f"{model}:", _table(lines), *filter(None, map(_failures, scores))])


def _failures(score: BenchmarkScores) -> str:
    """A line for comparisons that ended without a result, '' where none did."""
    failures = {kind.replace("_", " "): count for kind, count in score.verifier_failures.items() if count}
    counts = ", ".join(f"{kind} {count:,}" for kind, count in failures.items())
    return f"{score.title}: comparisons that ended without a result, scored 0: {counts}." if counts else ""


def _differences(models: Scores, seed: int) -> str:
    (first, base), *others = models.items()
    found = {model: differences(base, scores, seed) for model, scores in others}
    names = [*(domain for domain in DOMAINS if any(domain in change for change in found.values())), "overall"]
    lines = [[f"minus {first}", *names], ["---", *["---:"] * len(names)]]
    lines += [[model, *(_cell(change.get(name), sign="+") for name in names)] for model, change in found.items()]
    notes = ["Points, paired over the same prompts (95 % bootstrap interval)."]
    for model, scores in others:
        left_out = [_left_out(gap, first, model) for gap in unpaired(base, scores)]
        if left_out:
            notes.append(f"Left out of the differences of {model}, not of the means above: {'; '.join(left_out)}.")
    return "\n\n".join([_table(lines), *notes])


def _left_out(gap: Unpaired, first: str, other: str) -> str:
    if not gap.num_first or not gap.num_other:
        return f"{gap.title} ({first if gap.num_first else other} alone has it)"
    counts = f"{first}: {gap.num_first:,}, {other}: {gap.num_other:,}"
    return f"{gap.title} but for the {gap.num_both:,} prompts that both were asked ({counts})"


def _cell(interval: Interval | None, bold: bool = False, sign: str = "") -> str:
    if interval is None:
        return "-"
    value, low, high = (f"{100 * x:{sign}.1f}" for x in interval)
    return f"{f'**{value}**' if bold else value} ({low} to {high})"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
