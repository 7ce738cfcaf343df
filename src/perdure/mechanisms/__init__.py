"""Bricks that remember: tensors of any number and size, examples, second moments, subspaces."""
