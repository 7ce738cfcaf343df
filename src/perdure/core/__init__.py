"""The contract: learner, method, objective."""
