"""A damaged or foreign folder is refused by the name of its file, or answers as if nothing had happened."""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perdure.api.folders import teach_folder
from perdure.cli.main import main
from perdure.core.method import METHODS
from perdure.storage.files import write_sealed
from perdure.training.config import register
from perdure.training.run import resume, run

SAMPLE, ALL = 42, 2000
VALUES = [None, True, -1, 0, 2, 10**400, -(2**70), 1e308, float("nan"), "x", "", [], {}, [[]], {"a": 1}, "\ud800", ...]
NONSENSE = [b"", b"[", b"[" * 100_000, b"\xff\xfe{}", b"3\n", b"null\n", b"{}\n", b'{"seal": 1e999}\n', b"\x00" * 64]
KINDS = ("run", "stopped", "taught")
register()
EVERY = [
    f"lora(rank=2) + {name}" if method.protects else name
    for name, method in sorted(METHODS.items())
    if "classes" in (method.needs or {"classes"}) and name not in ("mod_x", "zscl")  # which need texts
]


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str


def ask(*words: str) -> Answer:
    """The command line; whatever it raises but its exit code is a traceback that a user would see."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Base:
    """A folder, another run's of the same kind, and what commands answer about it."""

    kind: str
    folder: Path
    other: Path
    said: dict[str, Any]

    @property
    def commands(self) -> dict[str, tuple[str, ...]]:
        """What is asked of a copy that is called x."""
        stream = ("--stream", "images(path='first', tasks=1)") if self.kind == "taught" else ()
        return {
            "predict": ("predict", "x", "first", "--top", "9"),
            "report": ("report", "x", "--out", "page.html"),
            "eval": ("eval", "x", *stream),
            "resume": ("resume", "x"),
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with pictures."""
    folder, before = tmp_path_factory.mktemp("state"), Path.cwd()
    os.chdir(folder)
    draw = np.random.default_rng(0)
    for album, names in {"first": ("cat", "dog"), "more": ("emu", "fox")}.items():
        for name in names:
            Path(album, name).mkdir(parents=True)
            for i in range(5):
                pixels = draw.integers(0, 255, (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(Path(album, name, f"{i}.png"))
    yield folder
    os.chdir(before)


def make(lab: Any, kind: str, method: str, folder: Path, seed: int) -> None:
    """A finished run, one that was stopped within its last task, or a learner of two lessons."""
    bench = lab.but(per_class=4, seed=seed)
    config = bench.config(method, batch_size=4, save_every=1)
    if kind == "taught":
        for album in ("first", "more"):
            teach_folder(Path(album), folder, config, {"epochs": 2})
    elif kind == "stopped":
        bench.stopped_run(method, folder, (2, 2), batch_size=4, save_every=1)
    else:
        run(config, folder)


def based(lab: Any, kind: str, method: str) -> Base:
    """What is damaged in a test, and what it answers when it is not."""
    folder, other = Path(f"{kind} {method}"), Path(f"{kind} {method} of another seed")
    make(lab, kind, method, folder, 0)
    make(lab, kind, method, other, 1)
    made = Base(kind, folder, other, {})
    for name, words in made.commands.items():
        shutil.copytree(folder, "x")
        assert ask(*words).code == 0
        made.said[name] = outcome(name, words)[1]
        shutil.rmtree("x")
    return made


def outcome(name: str, words: tuple[str, ...]) -> tuple[Answer, Any]:
    """The answer, and what of it must not depend on damage."""
    answer = ask(*words)
    if answer.code:
        return answer, None
    if name == "report":
        return answer, Path("page.html").read_bytes()
    return answer, result() if name == "resume" else answer.out


def result() -> tuple[bytes, dict[str, Any], bytes]:
    """What a run comes to; what earlier tasks left is not read again."""
    summary = json.loads(Path("x/summary.json").read_text())
    numbers = {k: v for k, v in summary.items() if not ("second" in k or k in ("peak_rss_bytes", "manifest", "seal"))}
    last = max(Path("x").glob("task-*/learner.safetensors"))
    return Path("x/results.jsonl").read_bytes(), numbers, last.read_bytes()


# Damage: what it does to the folder x; returns the names of which a refusal must say one, or none for no damage.


def cut(draw: random.Random, path: Path, base: Base) -> list[str]:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])
    return [path.name]


def flip(draw: random.Random, path: Path, base: Base) -> list[str]:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))
    return [path.name]


def lose(draw: random.Random, path: Path, base: Base) -> list[str]:
    path.unlink()
    return [path.name, path.parent.name]


def overwrite(draw: random.Random, path: Path, base: Base) -> list[str]:
    path.write_bytes(draw.choice(NONSENSE))
    return [path.name]


def swap(draw: random.Random, path: Path, base: Base) -> list[str]:
    """With a file of the same kind of another task, or with any."""
    others = [p for p in files() if p != path]
    other = draw.choice([p for p in others if p.name == path.name] or others)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return [path.name, other.name]


def take(draw: random.Random, path: Path, base: Base) -> list[str]:
    """The file, or the whole folder it stands in, of another run."""
    inner = path.relative_to("x")
    if not (base.other / inner).exists():
        return []
    if len(inner.parts) > 1 and draw.random() < 0.5:
        shutil.rmtree(path.parent)
        shutil.copytree(base.other / inner.parent, path.parent)
        return [path.parent.name]
    shutil.copy(base.other / inner, path)
    return [path.name, "manifest.json"]


def change(draw: random.Random, path: Path, base: Base) -> list[str]:
    """A value of a JSON file, which is not sealed anew."""
    changed = altered(draw, path)
    if changed is not None:
        path.write_text(json.dumps(changed) + "\n")
    return [path.name] if changed is not None else []


def altered(draw: random.Random, path: Path) -> Any:
    """The content of a JSON file with another value somewhere, or without one."""
    if path.suffix != ".json":
        return None
    content = node = json.loads(path.read_text())
    while True:
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        deeper = node[key]
        if not isinstance(deeper, dict | list) or not deeper or draw.random() < 0.2:
            break
        node = deeper
    value = draw.choice(VALUES)
    if value is ...:
        del node[key]
    else:
        node[key] = value
    return content if json.dumps(value if value is not ... else None) != json.dumps(deeper) else None


DAMAGES: list[Callable[[random.Random, Path, Base], list[str]]] = [cut, flip, lose, overwrite, swap, take, change]


def files() -> list[Path]:
    """Of the folder x, those that are read again."""
    return sorted(p for p in Path("x").rglob("*") if p.is_file() and p.name not in (".lock", "report.html"))


def check(base: Base, number: int) -> None:
    """One damaged folder, asked everything."""
    draw = random.Random(number)
    shutil.copytree(base.folder, "x")
    try:
        path, damage = draw.choice(files()), draw.choice(DAMAGES)
        named = damage(draw, path, base)
        shutil.copytree("x", "damaged")
        for name, words in base.commands.items():
            json_too = ("--json",) if draw.random() < 0.3 else ()
            answer, found = outcome(name, (*words, *json_too))
            told = f"{base.folder}, {number}: {damage.__name__} {path}: {name}: {answer}"
            if answer.code == 0:
                assert json_too or found == base.said[name], f"{told}: not the answer of an undamaged folder"
            else:
                assert answer.code == 2, told
                assert answer.err.count("\n") == 1, told
                assert any(each in answer.err for each in named), told
            shutil.rmtree("x")
            shutil.copytree("damaged", "x")
    finally:
        shutil.rmtree("x", ignore_errors=True)
        shutil.rmtree("damaged", ignore_errors=True)


@pytest.fixture(scope="module")
def bases(place: Path, lab: Any) -> list[Base]:
    return [based(lab, kind, "lora(rank=2)") for kind in KINDS]


def test_damage_is_refused_by_name_or_changes_no_answer(bases: list[Base]) -> None:
    for number in range(SAMPLE):
        check(bases[number % len(bases)], number)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_damage_is_refused_by_name_or_changes_no_answer_in_a_large_sample(bases: list[Base]) -> None:
    for number in range(SAMPLE, ALL):
        check(bases[number % len(bases)], number)


@pytest.mark.parametrize(
    "numbers", [range(36), pytest.param(range(36, 1000), marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_values_of_any_type_and_size_that_are_sealed_anew_end_in_an_answer_or_one_line(
    numbers: range, bases: list[Base]
) -> None:
    for number in numbers:
        draw, base = random.Random(number), bases[number % len(bases)]
        shutil.copytree(base.folder, "x")
        path = draw.choice([p for p in files() if p.suffix == ".json"])
        content = altered(draw, path)
        if isinstance(content, dict):
            write_resealed(path, content)
        name = draw.choice(list(base.commands))
        answer = ask(*base.commands[name])
        told = f"{number}: {path} {name}: {answer}"
        assert answer.code in (0, 2), told
        assert answer.code == 0 or answer.err.count("\n") == 1, told
        shutil.rmtree("x")


def write_resealed(path: Path, content: dict[str, Any]) -> None:
    """Also where it cannot be written by the package: with texts that are no Unicode."""
    try:
        write_sealed(path, content)
    except UnicodeEncodeError:
        from perdure.storage.schema import sealed

        path.write_text(json.dumps(sealed(content)) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", EVERY)
def test_folders_of_every_method_are_refused_by_name_or_answer_as_before(method: str, place: Path, lab: Any) -> None:
    base = based(lab, "run", method)
    for number in range(10):
        check(base, number)


def test_a_folder_goes_back_when_its_last_tasks_are_removed(bases: list[Base]) -> None:
    for base in bases:
        shutil.copytree(base.folder, "x")
        for task in sorted(Path("x").glob("task-*"))[1:]:
            shutil.rmtree(task)
        assert ask("predict", "x", "first").code == 0
        if base.kind != "taught":
            resume(Path("x"))
            assert result() == base.said["resume"]
        shutil.rmtree("x")
