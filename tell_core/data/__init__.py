"""Data: sources, curation, token budgets, anchor prompts, mixtures and orders."""
