"""Leverage learning: data, training, evaluation and analysis of the TELL method."""

__version__ = "0.1.0"
