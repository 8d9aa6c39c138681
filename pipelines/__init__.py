"""The stages, one readable file each, and the recipes."""

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"
"""Folder of the shipped YAML recipes; `-c NAME` finds them by their path below it."""
DEMO = Path(__file__).parent / "demos" / "models"
"""Folder of the tiny models of the demo."""
