"""`--config run.yaml`: the flags of a command, from a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from perdure.formatting import meant
from perdure.options.ranges import hints_of

_FLAG = "--config"


def expanded(arguments: Sequence[str], commands: Mapping[str, Callable[..., Any]]) -> list[str]:
    """A command line with the flags that stand in its file; those typed come after them, and so win.

    Raises:
        ValueError: when the file cannot be read, or holds something else than flags of the command.
    """
    words = list(arguments)
    places = [i for i, word in enumerate(words) if word.partition("=")[0] == _FLAG]
    # of `show` it is no file, but asks for one
    known = [f.name for f in fields(commands[words[0]])] if words and words[0] in commands else []  # type: ignore[arg-type]
    if not places or "config" not in known or words[0] == "show" or {"-h", "--help"} & {*words}:
        return words
    if len(places) > 1:
        raise ValueError(f"{_FLAG} is given {len(places)} times: keep one")
    (place,) = places
    named, own = words[place].partition("=")[2], 1
    if not named and words[place + 1 : place + 2] and not words[place + 1].startswith("--"):
        named, own = words[place + 1], 2
    if not named:
        raise ValueError(f"{_FLAG} needs a file, such as run.yaml; 'perdure show RUN --config' prints one")
    rest = [*words[1:place], *words[place + own :]]
    typed = {word.partition("=")[0].replace("_", "-") for word in rest if word.startswith("--")}
    return [words[0], *_flags(named, hints_of(commands[words[0]]), typed), *rest]


def _flags(named: str, kinds: Mapping[str, Any], typed: set[str]) -> list[str]:
    import yaml

    try:
        text = Path(named).read_text("utf-8")
        found, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{named} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{named}: expected lines such as 'method: inflora(rank=10)'")
    written = [key.value for key, _ in tree.value]
    if twice := [key for key in found if written.count(key) > 1]:
        raise ValueError(f"{named}: {twice[0]} is given {written.count(twice[0])} times: keep one")
    flags: list[str] = []
    known = [name for name in kinds if name not in ("config", "json", "import_")]
    seen: dict[str, str] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name in ("import", "import_"):
            raise ValueError(f"{named}: {key} stands on the command line alone: write --import {value}")
        if name not in known:
            raise ValueError(f"{named}: there is no option {key!r}{meant(name, known)}")
        if name in seen:
            raise ValueError(f"{named}: {seen[name]} and {key} are the same option: keep one")
        seen[name] = key
        if isinstance(value, bool) != (kinds[name] is bool) and value is not None:
            expected = "true or false" if kinds[name] is bool else "a value"
            raise ValueError(f"{named}: {key} is {value!r:.60}, expected {expected}")
        flag = f"--{name.replace('_', '-')}"
        if flag in typed or f"--no-{flag[2:]}" in typed or value is None:
            continue
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list) and kinds[name] is str:
            flags.append(f"{flag}={','.join(map(str, value))}")  # a text with commas, as milestones
        elif isinstance(value, list):
            flags += [flag, *map(str, value)] if value else []
        elif isinstance(value, dict):
            raise ValueError(f"{named}: {key} is {value!r:.60}, expected a value or a list of some")
        else:
            flags.append(f"{flag}={value}")
    return flags


def written(config: Mapping[str, Any]) -> str:
    """The file of a run's configuration, or a learner's, as YAML: what is not as usual, and what was taught on what.

    The usual backbone, method and objective stand there too, for those of lessons are not those of runs.
    """
    import yaml

    from perdure.training.config import RunConfig
    from perdure.training.defaults import for_lessons

    usual = {f.name: f.default for f in fields(RunConfig)}
    if not config.get("stream"):  # it is taught by hand, where other things are usual
        usual |= for_lessons(config["backbone"], config.get("objective"))
    known = {name: list(v) if isinstance(v, tuple) else v for name, v in config.items() if name in usual}
    always = ("backbone", "method", "objective")
    chosen = {name: v for name, v in known.items() if v not in ("", []) and (name in always or v != usual[name])}
    return str(yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True, width=10_000)).rstrip()
