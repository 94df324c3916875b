"""The report of a run folder (``metrics.py`` describes one): the page with its figures, and the result as a table.

In order: ``run`` reads, ``curves`` and ``figures`` draw, ``tables`` writes numbers, ``page`` puts them together.
"""

from copd_engine.report.page import write_report
from copd_engine.report.retention import retention_table
from copd_engine.report.tables import markdown_table, result_table

__all__ = ["markdown_table", "result_table", "retention_table", "write_report"]
