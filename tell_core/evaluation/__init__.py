"""Evaluation of one cell: generation, gold log-probability, answer parsing and metrics."""
