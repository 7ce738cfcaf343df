"""The loop and a run in a folder."""
