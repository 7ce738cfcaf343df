"""Methods of the user's own, in a Python file that need be no package."""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

OWN_METHODS = "PERDURE_IMPORT"
"""The variable of the environment that names the file: so runs in other processes, as of a grid, know it too."""


def import_own_methods() -> None:
    """Import the file that `PERDURE_IMPORT` names, once; its methods register themselves.

    Raises:
        ValueError: when it cannot be imported.
    """
    if not (named := os.environ.get(OWN_METHODS)):
        return
    path = Path(named).absolute()
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or ".").absolute() == path:
        return
    if known is not None:
        raise ValueError(f"--import {named}: there is a module {path.stem!r} already; call the file otherwise")
    found = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or found is None or found.loader is None:
        raise ValueError(f"--import {named}: expected a Python file, such as my_method.py")
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module  # first: classes look for the module that they are of
    try:
        found.loader.exec_module(module)
    except Exception as error:  # another's code, which may fail in any way: it is theirs to mend, where the line says
        del sys.modules[path.stem]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"--import {named} cannot be imported: {type(error).__name__}: {error}{where}") from error
