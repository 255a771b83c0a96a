"""Quanta discovery from gradients (QDG): candidate quanta of a model, and controls of the method.

Tokens are chosen, the gradient of each one's loss is taken once and projected, and the projections
are clustered by cosine distance. Source of the idea: arXiv 2303.13506; what was chosen where its
public code is silent: docs/quanta.md.
"""
