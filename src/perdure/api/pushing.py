"""An export with a model card, written from the run, in a repository of the hub or in a folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.api.learner import Learner
from perdure.export.model import export
from perdure.formatting import counted, printable
from perdure.options.paths import paths_in, unplaced, unplaced_path
from perdure.options.ranges import without_effect
from perdure.options.spec import parse
from perdure.reporting.contents import contents
from perdure.storage.files import temporary_folder, write_text

_DESCRIBING = ("README.md", "labels.json", "learnt.json", "adapter_config.json")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def push(folder: str | Path, to: str, kind: str = "merged", public: bool = False, device: str | None = None) -> str:
    """Export the learner in `folder` with a model card; returns where it now is.

    Nothing of the data goes along but the names of tasks and classes: no images, no paths, no statistics.

    Args:
        folder: the learner's or a run's.
        to: "name/model" on the hub, with the token that `hf auth login` keeps; or a new folder, which begins with
            "./", "/" or "~" or lies in a folder that is there.
        kind: of the export, see `perdure.export.model.Target`.
        public: whether all can see a repository that is made now.
        device: where to compute.

    Raises:
        ValueError: when it cannot be exported, `to` is neither, or the hub refuses.
    """
    folder = Path(folder)
    place = _folder(to)
    if place is None and not _REPOSITORY.fullmatch(to):
        raise ValueError(f"{to!r}: expected 'name/model' of the hub, or a folder such as './model'")
    if place is not None and place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{to} is there already and not an empty folder: give a new one")
    if place is not None:
        without_effect(f"on {to}, which is a folder", public=public or None)

    def describe(made: Path) -> None:
        facts, readme = contents(folder), made / "README.md"
        _without_paths(made, [facts["backbone"], facts["method"], facts["objective"]])
        write_text(readme, card(facts) + "\n## Use\n\n" + readme.read_text(encoding="utf-8"))

    if place is not None:
        return str(export(Learner.load(folder, device), place, kind, describe))
    with temporary_folder() as held:
        return _upload(export(Learner.load(folder, device), held / "model", kind, describe), to, public)


def card(found: dict[str, Any]) -> str:
    """The model card, in Markdown with the hub's heading, of what `contents` says."""
    base = _base(found["backbone"])
    facts = ["library_name: perdure", "tags:", "- continual-learning", *([f"base_model: {base}"] if base else [])]
    facts += ["license: other"] if found["licence"] else []
    shown = {name: _plain(unplaced(found[name])) for name in ("backbone", "method", "objective")}
    lines = ["---", *facts, "---", "", f"# {counted(len(found['tasks']), 'task')}, learnt one after another", ""]
    lines += [f"- Backbone: `{shown['backbone']}`", f"- Method: `{shown['method']}`"]
    lines += [f"- Objective: `{shown['objective']}`", f"- Made by perdure {found['perdure'] or '?'}"]
    lines += [f"- Licence: {found['licence']}"] if found["licence"] else []
    if not found["licence"]:
        lines += ["- Licence: that of the backbone's weights holds for what was made of them"]
    score = str(found["score"]).replace("_", " ")
    lines += ["", "## What was taught", "", f"| | task | classes | images | {score} when learnt | {score} now |"]
    lines += ["|---|---|---|---|---|---|"]
    for task in found["tasks"]:
        names = ", ".join(map(_plain, task["classes"]))
        cells = [task["number"], _plain(task["name"]), names, task["train"] or "–"]
        cells += ["–" if task[key] is None else f"{task[key]:.1%}" for key in ("when_learnt", "now")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"The last column is {score} after the last task: what it lost since is what was forgotten."]
    return "\n".join(lines) + "\n"


def _folder(to: str) -> Path | None:
    place = Path(to).expanduser()
    within = bool(place.parent.name) and place.parent.is_dir()
    local = to.startswith((".", "/", "~")) or place.is_absolute() or place.exists() or within
    return place if local else None


def _upload(made: Path, to: str, public: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        api = HfApi()
        where = str(api.create_repo(to, private=not public, exist_ok=True))
        api.upload_folder(repo_id=to, folder_path=str(made), commit_message="Written by perdure push")
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(
            f"{to}: the hub refuses ({reason}); check name, network and 'hf auth login', or give a folder such as "
            "'./model'"
        ) from error
    return where


def _base(backbone: str) -> str | None:
    """The hub's name of the backbone, where it has one."""
    for each in parse(backbone):
        for name, value in each.kwargs:
            if name in ("path", "name") and isinstance(value, str) and _REPOSITORY.fullmatch(value):
                return value
    return None


def _without_paths(folder: Path, texts: Sequence[str]) -> None:
    """Where an export describes itself, paths are cut to their last names; a path is what stands between quotes."""
    paths = {path for text in texts for path in paths_in(text) if unplaced_path(path) != path}
    for file in (folder / name for name in _DESCRIBING if (folder / name).is_file()):
        content = file.read_text(encoding="utf-8")
        for written in {each for path in paths for each in (path, json.dumps(path)[1:-1])}:
            quoted = re.compile(rf"(?<=['\"]){re.escape(written)}(?=['\"\\])")
            content = quoted.sub(lambda found: unplaced_path(found[0]), content)
        write_text(file, content)


def _plain(text: str) -> str:
    """In a table's cell: nothing that Markdown or HTML would act on."""
    return re.sub(r"[|<>`\[\]]", lambda found: f"&#{ord(found[0])};", printable(text))
