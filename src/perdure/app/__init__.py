"""A page in the browser, and the same by HTTP: see docs/app.md."""
