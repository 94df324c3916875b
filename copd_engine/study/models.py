"""Whether the models that a study names will exist, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from copd_engine.algorithms import final_label, result_labels
from copd_engine.config import RunConfig
from copd_engine.study.config import NamedModel, StudyConfig, variant_of
from copd_engine.types import UserError, suggest


def check_models(study: StudyConfig, configs: Mapping[str, RunConfig]) -> None:
    """UserError for a row that the result of its variant will not have, for a domain on which a model will not be
    evaluated, and for a claim that compares averages over different domains. ``configs``: by variant."""
    for model in study.models:
        _check(model, configs[variant_of(model.name)])
    for index, claim in enumerate(study.claims):
        if claim.better is None or claim.than is None or claim.domain != "average":
            continue
        ours, theirs = (configs[variant_of(name)].branch_names for name in (claim.better, claim.than))
        if set(ours) != set(theirs):
            raise UserError(
                f"claims.{index}: {claim.better!r} is averaged over {', '.join(ours)}, {claim.than!r} over "
                f"{', '.join(theirs)}; name a domain that both have"
            )


def _check(model: NamedModel, config: RunConfig) -> None:
    variant, _, row = model.name.partition("/")
    labels = result_labels(config)
    if not row and final_label(config) is None:
        raise UserError(
            f"{model.where}: variant {variant!r} has one branch and nothing to merge; write '{variant}/{labels[1]}'"
        )
    if row and row not in labels:
        known = ", ".join(map(repr, labels))
        raise UserError(
            f"{model.where}: variant {variant!r} has no row {row!r}{suggest(row, labels)}; its rows are {known}"
        )
    if model.domain not in ("average", *config.branch_names):
        raise UserError(
            f"{model.where}: {model.name!r} is not evaluated on {model.domain!r}"
            f"{suggest(model.domain, config.branch_names)}; its domains are {', '.join(config.branch_names)}, average"
        )
