"""Figures and the self-contained HTML report of a run."""

from tell_core.report.page import write_report

__all__ = ["write_report"]
