"""All methods: every module of this package is imported, and registers what it defines.

Third parties register theirs through the entry-point group `perdure.methods`.
"""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
for _entry in entry_points(group="perdure.methods"):
    _entry.load()
