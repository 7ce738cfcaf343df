"""Grids of runs and presets."""
