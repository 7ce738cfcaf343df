"""`python -m perdure.cli`."""

from perdure.__main__ import main

main()
