"""Branches into one model: in memory, or streamed from folder to folder; a search over the methods; the command."""

from copd_engine.merge.methods import merge

__all__ = ["merge"]
