"""Whether a model's files stay in its folder: asked before any library follows what they name."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

_ADAPTER = "adapter_config.json"
_INFORMATIVE = ("_name_or_path", "name_or_path", "hf_hub_id", "hf_tokenizer_name")
"""Entries that are never followed: they say where a model came from."""
_TEXT_TOWER = "hf_model_name"
"""Of OpenCLIP: where a configuration is read, and no weights; where there is no network, that is a folder."""


def check_confined(folder: Path) -> None:
    """Refuse a model whose files lead out of its folder, before any library follows them.

    Libraries open what an index, a configuration or a tokenizer names: weights of another format, which can run foreign
    code, or somebody else's files. A path to nowhere, as the machine where a model was saved leaves it, does no harm.

    Raises:
        ValueError: names the file and what it leads to.
    """
    if (folder / _ADAPTER).is_file():
        raise ValueError(
            f"{str(folder)!r} holds {_ADAPTER}, an adapter of PEFT, which leads to another model: merge it into that "
            "one, with merge_and_unload, and give what that saves"
        )
    for file in folder.glob("*.index.json"):
        found = _json(file)
        names = found.get("weight_map") if isinstance(found, dict) else None
        for name in names.values() if isinstance(names, dict) else [names]:
            if not (isinstance(name, str) and _plain(name) and name.endswith(".safetensors")):
                raise ValueError(
                    f"{str(file)!r} names {str(name)[:80]!r}, expected .safetensors files beside it: others are not "
                    "read, since they can run foreign code; get the model again"
                )
    for file in folder.glob("*config.json"):
        for key, text in _texts(_json(file)):
            if key == _TEXT_TOWER and Path(text).is_dir():
                check_confined(Path(text))
            elif key not in _INFORMATIVE and not _plain(text) and _leads_somewhere(folder, text):
                raise ValueError(
                    f"{str(file)!r} leads out of its folder: {key}={text[:80]!r}; put that file into the folder, and "
                    "write its bare name"
                )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):  # whoever needs it says what is wrong
        return None


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in what a JSON file holds, each with the key next to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _texts(each, str(name))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, key)


def _plain(name: str) -> bool:
    return PurePath(name).name == name and "\\" not in name


def _leads_somewhere(folder: Path, name: str) -> bool:
    path = name.removeprefix("local-dir:").removeprefix("file://")
    try:
        return any(place.exists() for place in (Path(path).expanduser(), folder / path))
    except (OSError, ValueError, RuntimeError):  # a long text, for example
        return False
