"""No two modules of the package need each other, and nobody asks what class an objective or a method is."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
MODULES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in (SOURCE / "perdure").rglob("*.py")
}


def imported(module: str) -> set[str]:
    """All that a module imports of the package: at its top, within functions, and for the type checker only."""
    found = set()
    for line in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(line, ast.Import):
            found |= {each.name for each in line.names}
        elif isinstance(line, ast.ImportFrom) and line.module:
            # the module of that name, or else something that its package defines
            full = {f"{line.module}.{each.name}" for each in line.names}
            found |= full & MODULES.keys() or {line.module}
    return (found & MODULES.keys()) - {module}


def test_no_module_imports_itself_by_way_of_others() -> None:
    imports = {module: imported(module) for module in MODULES}
    # who imports nothing, or is imported by nobody, of what is left is in no cycle
    while free := {m for m in imports if not imports[m] or not any(m in others for others in imports.values())}:
        imports = {m: others - free for m, others in imports.items() if m not in free}
    assert set(imports) == set()


def test_what_an_objective_or_a_method_can_is_asked_and_not_its_class() -> None:
    classes = {"Classify", "ZeroShot", "Retrieve"}
    asked = {
        (module, line.module)
        for module, file in MODULES.items()
        for line in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(line, ast.ImportFrom) and line.module and not module.startswith("perdure.objectives")
        if line.module.startswith("perdure.methods.") or classes & {each.name for each in line.names}
    }
    assert asked == set()


# What every entry point is called; what is noted before a run and after it, of searches and of answers alike.
SHARED_NAMES = {"main", "before", "after"}


def test_no_two_modules_give_one_name_to_different_things() -> None:
    places: dict[str, list[str]] = {}
    for module, file in MODULES.items():
        for line in ast.parse(file.read_text("utf-8")).body:
            if isinstance(line, ast.FunctionDef | ast.ClassDef) and not line.name.startswith("_"):
                places.setdefault(line.name, []).append(module)
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in SHARED_NAMES} == {}


@pytest.mark.parametrize("script", sorted((SOURCE.parent / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_benchmarks_import_what_there_is(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specification = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)
    monkeypatch.syspath_prepend(script.parent)  # as it is where a script is run
    specification.loader.exec_module(module)
