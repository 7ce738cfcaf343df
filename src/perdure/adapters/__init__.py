"""Bricks that are put on layers; they know modules, not tasks."""
