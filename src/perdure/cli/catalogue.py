"""What there is: names, options and texts of methods, streams and backbones, without importing what computes.

Read from the sources as syntax trees, because torch alone takes seconds to import and a list should come at once. Only
methods of third parties, which may lie anywhere, are imported.
"""

import ast
import builtins
import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from perdure.experiments.recipes import recipes
from perdure.options import ranges
from perdure.options.own_methods import OWN_METHODS, import_own_methods
from perdure.options.rates import RATES

Listed = Literal["methods", "streams", "backbones", "pretexts", "recipes"]
_REGISTRIES = {"streams": "STREAMS", "backbones": "BACKBONES"}
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class CatalogueEntry:
    """One name.

    Args:
        options: as in its signature, with defaults: `rank=10, at='kv'`.
        ranges: option -> what a number may be: `int from 1 to 4096`.
        about: all that is written about it.
    """

    options: str
    ranges: Mapping[str, str]
    about: str
    lr: str = ""
    """Of a method: its own learning rate, and where that is from."""

    @property
    def facts(self) -> dict[str, str]:
        """Ranges, and a method's learning rate."""
        return {**self.ranges, **({"learning rate": self.lr} if self.lr else {})}

    @property
    def sentence(self) -> str:
        """What it is, in one paragraph."""
        return " ".join(self.about.partition("\n\n")[0].split())


def entries(kind: Listed) -> dict[str, CatalogueEntry]:
    """All of a kind, by name."""
    if kind == "recipes":
        return {name: CatalogueEntry("", {}, each.about) for name, each in recipes().items()}
    if kind in _REGISTRIES:
        return dict(_factories(kind, _REGISTRIES[kind]))
    if kind == "pretexts":
        return dict(_classes("pretraining"))
    ours = {name: replace(each, lr=_rate(name)) for name, each in _classes("methods")}
    if entry_points(group="perdure.methods") or os.environ.get(OWN_METHODS):
        import_module("perdure.methods")
        import_own_methods()
        every = import_module("perdure.core.method").METHODS
        ours |= {name: described(made) for name, made in every.items() if name not in ours}
    return ours


def _rate(method: str) -> str:
    """Its learning rate where none is given, for people."""
    own = RATES.get(method)
    return f"{own.rate:g} ({own.source})" if own else "its partner's, or 0.001"


def described(made: Callable[..., Any]) -> CatalogueEntry:
    """What is known of a class or factory that is imported."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    options = {k: p.default for k, p in inspect.signature(made).parameters.items() if p.kind in named}
    about = inspect.cleandoc(made.__doc__ or "")
    if inspect.isclass(made):
        about = f"{inspect.cleandoc(sys.modules[made.__module__].__doc__ or '')}\n\n{about}"
    hints = ranges.hints_of(made)
    return _entry({k: (v, hints.get(k, Any)) for k, v in options.items()}, about)


def _entry(options: Mapping[str, tuple[Any, Any]], about: str) -> CatalogueEntry:
    """From default and annotation of each option."""
    shown = (name if value is inspect.Parameter.empty else f"{name}={value!r}" for name, (value, _) in options.items())
    numeric = {name: ranges.expected(hint) for name, (_, hint) in options.items() if ranges.ranged(hint)}
    return CatalogueEntry(", ".join(shown), numeric, about)


def _classes(package: str) -> Iterator[tuple[str, CatalogueEntry]]:
    """Classes of a package that name themselves: `class Mine(Method, name="mine")`."""
    for file in (_ROOT / package).glob("*.py"):
        module = _Module.of(package, file.stem)
        for made in (each for each in module.made.values() if isinstance(each, ast.ClassDef)):
            for word in made.keywords:
                if word.arg == "name" and isinstance(word.value, ast.Constant):
                    inits = [f for f in made.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
                    options = module.options(inits[0]) if inits else {}
                    text = f"{ast.get_docstring(module.tree) or ''}\n\n{ast.get_docstring(made) or ''}"
                    yield str(word.value.value), _entry(options, text)


def _factories(package: str, registry: str) -> Iterator[tuple[str, CatalogueEntry]]:
    """Functions that a package's dictionary names."""
    module = _Module.of(package, "__init__")
    listed = module.values[registry]
    assert isinstance(listed, ast.Dict)
    for name, value in zip(map(ast.literal_eval, filter(None, listed.keys)), listed.values, strict=True):
        home, made = module.found(value)
        assert isinstance(made, ast.FunctionDef)
        options = home.options(made)
        for mark in made.decorator_list:
            if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") == "stream":
                # As `perdure.streams.options.stream` does: the first argument stands for its class's fields.
                common = made.args.args[0]
                del options[common.arg]
                without = {word.value for word in mark.args if isinstance(word, ast.Constant)}
                place, fields = home.found(common.annotation)
                options |= {k: v for k, v in place.fields(fields).items() if k not in without}
        yield name, _entry(options, ast.get_docstring(made) or "")


class _Module:
    """A module's syntax tree, and what its names stand for."""

    def __init__(self, package: str, name: str) -> None:
        self.tree = ast.parse((_ROOT / package / f"{name}.py").read_text("utf-8"))
        self.values: dict[str, ast.expr] = {}
        self.made: dict[str, ast.stmt] = {}
        self.places: dict[str, tuple[str, str]] = {}
        for line in self.tree.body:
            match line:
                case ast.ImportFrom(module=str(where)) if where.startswith("perdure."):
                    package, _, name = where.removeprefix("perdure.").rpartition(".")
                    self.places |= {each.asname or each.name: (package, name) for each in line.names}
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    self.made[name] = line
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.values[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self.values[name] = value

    @staticmethod
    @functools.cache
    def of(package: str, name: str) -> "_Module":
        """`perdure.<package>.<name>`."""
        return _Module(package, name)

    def found(self, named: ast.expr | None) -> tuple["_Module", ast.stmt]:
        """The class or function of a name, with the module that defines it."""
        assert isinstance(named, ast.Name)
        home = self if named.id in self.made else _Module.of(*self.places[named.id])
        return home, home.made[named.id]

    def options(self, made: ast.FunctionDef) -> dict[str, tuple[Any, Any]]:
        """Default and annotation of the arguments of a function or constructor."""
        words = [
            each for each in (*made.args.posonlyargs, *made.args.args, *made.args.kwonlyargs) if each.arg != "self"
        ]
        positional = len(words) - len(made.args.kwonlyargs)
        lacking = positional - len(made.args.defaults)
        values = [*[None] * lacking, *made.args.defaults, *made.args.kw_defaults]
        return {w.arg: self._option(value, w.annotation) for w, value in zip(words, values, strict=True)}

    def fields(self, made: ast.stmt) -> dict[str, tuple[Any, Any]]:
        """Default and annotation of the fields of a dataclass."""
        lines = made.body if isinstance(made, ast.ClassDef) else []
        written = (each for each in lines if isinstance(each, ast.AnnAssign))
        named = ((line.target, line) for line in written)
        return {n.id: self._option(line.value, line.annotation) for n, line in named if isinstance(n, ast.Name)}

    def _option(self, default: ast.expr | None, annotation: ast.expr | None) -> tuple[Any, Any]:
        value = inspect.Parameter.empty if default is None else self.meant(default)
        return value, Any if annotation is None else self.meant(annotation)

    def meant(self, written: ast.expr) -> Any:
        """The value of a default, or the type of an annotation; what has no range is anything."""
        # Our own source, as importing it would; of its names only those that make ranges matter here.
        return eval(ast.unparse(written), {}, _Names(self))


class _Names(dict[str, Any]):
    """What the names in a module's annotations mean."""

    def __init__(self, module: _Module) -> None:
        super().__init__(vars(builtins) | vars(typing) | vars(ranges))
        self.module = module

    def __missing__(self, name: str) -> Any:
        home = _Module.of(*self.module.places[name]) if name in self.module.places else self.module
        return home.meant(home.values[name]) if name in home.values else Any
