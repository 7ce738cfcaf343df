"""Teach pre-trained vision and vision-language models one task after another, without forgetting."""

__version__ = "0.1.0"
