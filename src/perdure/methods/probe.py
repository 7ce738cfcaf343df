"""Linear probing: heads on frozen features, the cheapest baseline."""

from perdure.core.method import Method


class Probe(Method, name="probe"):
    """Trains the objective's heads only; features are computed once per image."""

    borderless = True
