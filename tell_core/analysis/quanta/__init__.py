"""Quanta discovery from gradients (QDG): candidate quanta of a model, and controls of the method.

Tokens are chosen, the gradient of each one's loss is taken once and projected, and the projections
are clustered by cosine distance. Sources: arXiv 2303.13506 (the idea); METHOD section 5 of the
design (what the public code does not say).
"""
