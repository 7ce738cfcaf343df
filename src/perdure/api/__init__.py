"""The learner as people use it."""
