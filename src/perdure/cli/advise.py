"""`perdure advise`: apart from the other commands, because it answers without torch and so at once."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from perdure.cli.console import Command, Screen
from perdure.formatting import human_bytes, percent_with_spread
from perdure.reporting.advise import Advice, Constraints, RankedMethod, advise, in_words, named, shipped
from perdure.reporting.families import FAMILIES, TITLES, best_of_families, family_cells

_MOST, _FEWER = 8, 3  # methods shown of the setting that fits best, and of each other one
_NAMED = 3  # methods of those left out


@dataclass(frozen=True, kw_only=True)
class Advise(Constraints, Command):
    """Which method to take: measured ones that keep to your constraints, best first."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Folder that `perdure compare` wrote, to answer from your own measurements instead of those that were shipped."""

    family: bool = False
    """The seven families side by side, each by the best of its methods that keeps to your constraints."""

    def __post_init__(self) -> None:
        """Nothing: values are checked when the command is called, where a mistake becomes one line."""

    def __call__(self, screen: Screen) -> None:
        """Print the list, with what it relies on."""
        asked = Constraints(**{f.name: getattr(self, f.name) for f in fields(Constraints)})
        # Only reading runs takes torch.
        read = (lambda _: shipped()) if self.from_ is None else import_module("perdure.reporting.tables").settings_of
        answers = advise(read([self.from_]), asked)
        said, folder = in_words(asked), None if self.from_ is None else str(self.from_)
        if self.family:
            self._families(said, answers, screen)
            return
        content = {"event": "advice", "asked": said, "from": folder, "answers": [asdict(a) for a in answers]}
        screen.result(content, *advice_lines(said, answers, folder))

    def _families(self, said: Sequence[str], answers: Sequence[Advice], screen: Screen) -> None:
        found, lines = [], [f"asked: {', '.join(said)}"]
        for answer in answers:
            best = best_of_families(answer)
            rows = [family_cells(*each) for each in best]
            named_cells = [dict(zip(TITLES, row, strict=True)) for row in rows]
            choices = [{"family": f.name, "choice": c if isinstance(c, str) else asdict(c)} for f, c in best]
            sizes = [{"lines": int(row["lines"] or 0) or None} for row in named_cells]
            families = [a | b for a, b in zip(choices, sizes, strict=True)]
            found.append({"setting": answer.setting, "tasks": answer.tasks, "families": families})
            lines += ["", _heading(answer)]
            widths = [max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
            for first, second, *rest in (TITLES, *rows):
                numbers = [cell.rjust(width) for cell, width in zip(rest, widths[2:], strict=True)]
                lines.append("  ".join([first.ljust(widths[0]), second.ljust(widths[1]), *numbers]).rstrip())
        lines += ["", "choose", *(f"  {family.name}: {family.choose} ({family.source})" for family in FAMILIES)]
        lines.append("lines: of the method's file and of the adapters and mechanisms that it is made of")
        lines.append("measured apart: what is no method, by benchmarks/specialists.py; figures in docs/choosing.md")
        known = [{"family": f.name, "choose": f.choose, "source": f.source} for f in FAMILIES]
        screen.result({"event": "families", "asked": said, "families": known, "answers": found}, *lines)


def _heading(answer: Advice) -> str:
    """What was measured; of a longer stream also after how many tasks, where all tables would seem to be of the end."""
    about = answer.setting
    early = f", after the first {answer.tasks} tasks" if answer.tasks < about["tasks"] else ""
    return f"{about['data']}, {about['tasks']} tasks, {about['classes']} classes, {about['backbone']}{early}"


def advice_lines(asked: Sequence[str], answers: Sequence[Advice], folder: str | None) -> list[str]:
    """The answer for people, line by line."""
    lines = [f"asked: {', '.join(asked)}"]
    if not answers:
        return [
            *lines,
            f"not known: {folder or 'the shipped table'} has no such measurement. Measure methods on your own stream "
            "with 'perdure compare', then ask with --from and its folder",
        ]
    for number, answer in enumerate(answers):
        lines += ["", *_answer(answer, first=not number)]
    if len(answers) > 1 or any(len(answer.choices) > _MOST for answer in answers):
        lines += ["", "--json has all methods, notes and commands of each data set."]
    if folder is None:
        lines += ["", "On other data the order may differ: measure with 'perdure compare', then ask with --from."]
    return lines


def _answer(answer: Advice, first: bool) -> list[str]:
    """What one setting says; in full for the first, which fits best."""
    most = _MOST if first else _FEWER
    about = answer.setting
    lines = [_heading(answer)]
    if not answer.choices:
        lines.append("not known: no method that was measured here is known to keep to all of this")
    else:
        titles = ("", "accuracy", "new task", "forgetting", "stored", "step", "method")
        rows = [titles, *map(_cells, answer.choices[:most])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]
        if len(answer.choices) > most and first:
            lines.append(f"and {len(answer.choices) - most} more")
    if not first and answer.choices:
        return lines
    lines += [f"left out, {why}: {_some(methods)}" for why, methods in answer.left_out.items()]
    lines += [f"not known, {what}: {_some(methods)}" for what, methods in answer.unknown.items()]
    days = " to ".join(dict.fromkeys((about["created"][0], about["created"][-1])))
    commits = f" at {', '.join(about['git'])}" if about["git"] else ""
    lines += [*answer.notes, f"measured {days} with perdure {', '.join(about['perdure'])}{commits}"]
    if not answer.choices:
        return lines
    lines += ["to use the first:", f"  {use_command(answer)}"]
    three = answer.choices[:3]
    lines.append("to measure the first three:")
    for number, backbone in enumerate(dict.fromkeys(choice.backbone for choice in three)):
        methods = shlex.join(choice.method for choice in three if choice.backbone == backbone)
        other = f" --backbone {shlex.quote(backbone)}" if backbone else ""
        lines.append(f"  {about['command']}{other} --methods {methods} --out runs/again{number or ''}")
    return lines


def use_command(answer: Advice) -> str:
    """The command that teaches a learner with the first choice, trained as it was measured but for the passes."""
    about, choice = answer.setting, answer.choices[0]
    words = ["perdure", "learn", "photos/january", "--into", "my.learner"]
    training = {k: v for k, v in about.get("training", {}).items() if k in ("objective", "lr", "batch_size")}
    chosen = {"backbone": choice.backbone or about.get("backbone"), "method": choice.method} | training
    for name, value in chosen.items():
        if value is not None and (name, value) != ("objective", "classify()"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _some(methods: Sequence[str]) -> str:
    more = f" and {len(methods) - _NAMED} more" if len(methods) > _NAMED else ""
    return f"{', '.join(methods[:_NAMED])}{more}"


def _cells(choice: RankedMethod) -> tuple[str, ...]:
    sign = {"extrapolated": "~", "at most": "≤"}.get(choice.stored, "")
    stored = "?" if choice.stored_bytes is None else f"{sign}{human_bytes(choice.stored_bytes)}"
    step = {"none": "none", "unknown": "?"}.get(choice.steps) or f"{choice.step:.2f}"
    shares = map(percent_with_spread, (choice.share, choice.new_task_acc, choice.forgetting))
    return f"{choice.place}{'=' if choice.tied else ' '}", *shares, stored, step, named(vars(choice))
