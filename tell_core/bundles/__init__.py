"""Cells as bundles: exported to a directory each, run where there is a GPU, imported again.

`layout` and `running` import nothing but torch, transformers, peft, safetensors and numpy, so that
``python -m tell_core.bundles run BUNDLE`` works from a plain checkout, without network.
"""
