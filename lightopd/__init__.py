"""Offline on-policy distillation from a token-exact, lineage-checked cache."""

__version__ = "0.1.0"
