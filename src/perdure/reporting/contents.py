"""What a learner's folder says of itself: what was taught, when, with which scores; and what of the data it holds.

Read from what is sealed, without tensors: it waits for no torch.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perdure import metrics
from perdure.core.manifests import TAUGHT, Checkpoint, read_record, recorded_moves, recorded_size, whole
from perdure.core.manifests import sources as sources_of
from perdure.formatting import command, human_bytes, shortened
from perdure.options.paths import moved
from perdure.options.spec import changed, parse
from perdure.storage import schema
from perdure.storage.files import tensor_shapes
from perdure.storage.schema import Examples

LICENCES = {"pocket": "the weights come from images that allow research use only (Tiny-ImageNet, Flickr8k)"}
"""Of weights that perdure brings itself, by backbone; those of others have the licence of whoever gave them."""
_NAMED = 12  # classes on one line
_STATISTICS = re.compile(r"[./](means|sums|covariances|gram|prototypes)([./]|$)")


def contents(folder: Path) -> dict[str, Any]:
    """A learner's or a run's folder as JSON.

    Returns:
        `method`, `backbone`, `objective`, `created`, `perdure` (the version), `licence` of the weights below it where
        it is known, `bytes` of the folder, `score` (the name of what is measured), `tasks` (see below), `declared`
        (tasks of its stream), `forgotten` (when classes were, one by one) and `holds` (what of the data can be found in
        the folder, a line each). A task has
        `number` (from 1), `name`, `classes` (their names), `folder` it was taught from, `finished`, `train` and `test`
        (numbers of images), `when_learnt` and `now` (scores, None where there is none) and `skipped` files.

    Raises:
        ValueError: when it is no such folder, or something in it is damaged.
    """
    record, done = read_record(folder), whole(folder)
    config, declared = record["config"], record["stream"]["tasks"]
    rows = [row for each in done for row in each.rows]
    score, _, _ = metrics.scored(rows)
    matrix = metrics.matrix_of(rows, score, len(done[-1].tasks) if done else 0)
    ends, sources, taught = {each.learnt - 1: each for each in done}, sources_of(done), _taught(done)
    tasks = []
    for index, task in enumerate(done[-1].tasks[: done[-1].learnt] if done else ()):
        end = ends.get(index)  # none where several were learnt before one `save`, or in a member that was merged
        source = sources.get(index)
        facts = declared[index] if index < len(declared) else None
        tasks.append(
            {
                "number": index + 1,
                "name": task.name,
                "classes": list(task.names),
                "folder": source["folder"] if source else None,
                "finished": end.manifest.get("finished") if end else None,
                "train": facts.get("train") if facts else taught.get(index),
                "test": facts.get("test") if facts else None,
                "when_learnt": matrix[index][index],
                "now": matrix[done[-1].learnt - 1][index],
                "skipped": list(source.get("skipped", ())) if source else [],
            }
        )
    return {
        **_described(folder, config),
        "created": record.get("created"),
        "perdure": record.get("perdure"),
        "licence": licence_of(str(config.get("backbone", ""))),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "score": score,
        "declared": len(declared),
        "forgotten": [day for each in done for day in each.manifest.get("forgotten", ())],
        "tasks": tasks,
        "holds": list(_held(folder, done, bool(declared))),
    }


def _described(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What the learner is made of, as it is since the last move and resize."""
    moves, size = recorded_moves(folder), recorded_size(folder)
    found = {name: config.get(name, "") for name in ("method", "backbone", "objective", "stream")}
    found |= {name: moved(str(text), moves) for name, text in found.items() if moves and text}
    return found | ({"backbone": changed(str(found["backbone"]), **size)} if size else {})


def licence_of(backbone: str) -> str | None:
    """What is known of the licence of a backbone's weights, by its spec."""
    try:
        found = parse(backbone) if backbone else ()
    except ValueError:
        return None
    return next((LICENCES[each.name] for each in found if each.name in LICENCES), None)


def told_contents(folder: Path, found: dict[str, Any]) -> list[str]:
    """The same for a person, line by line."""
    learnt, declared = len(found["tasks"]), found["declared"]
    tasks = f"{learnt} of {declared} tasks" if declared > learnt else f"{learnt} task{'s' if learnt != 1 else ''}"
    made = f", made {found['created'].partition('T')[0]}" if found["created"] else ""
    lines = [
        f"{folder}: {tasks} learnt, {human_bytes(found['bytes'])}{made} with perdure {found['perdure'] or '?'}",
        f"method     {found['method']}",
        f"backbone   {found['backbone']}",
        *([f"licence    {found['licence']}"] if found["licence"] else []),
        f"objective  {found['objective']}",
        *([f"stream     {found['stream']}"] if found["stream"] else []),
    ]
    for task in found["tasks"]:
        lines += ["", *_told_task(task, found["score"])]
    if days := [day.partition("T")[0] for day in found["forgotten"]]:
        lines += ["", f"forgotten  {len(days)} class{'es' if len(days) > 1 else ''}, {', '.join(dict.fromkeys(days))}"]
    if not found["tasks"]:
        lines += ["", "nothing was learnt yet"]
    return [*lines, "", "of the data the folder holds:", *(f"  {line}" for line in found["holds"] or ["nothing"])]


def _told_task(task: dict[str, Any], score: str) -> Iterator[str]:
    when = f", {task['finished'].partition('T')[0]}" if task["finished"] else ""
    counts = [f"{task[part]} {what}" for part, what in (("train", "taught"), ("test", "tested")) if task[part]]
    yield f"{task['number']}  {shortened(task['name'])}{when}{': ' if counts else ''}{', '.join(counts)}"
    if names := task["classes"]:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"   {', '.join(shortened(name, 60) for name in names[:_NAMED])}{more}"
    if task["folder"]:
        yield f"   from {task['folder']}"
    if task["now"] is not None:
        then = "" if task["when_learnt"] is None else f"; {task['when_learnt']:.1%} right after it was learnt"
        yield f"   {score} {task['now']:.1%}{then}"
    if task["skipped"]:
        yield f"   {len(task['skipped'])} files could not be read and were left out"


def _held(folder: Path, done: list[Checkpoint], declared: bool) -> Iterator[str]:
    """What of the data can be found in the folder, for who gives it away; `declared`: tasks of a stream can."""
    begun = folder / f"task-{done[-1].learnt if done else 0:03d}"
    unfinished = begun.is_dir() and any(begun.iterdir())
    if done or declared or unfinished:
        yield "names of tasks and classes, and the paths that the data was read from (run.json, manifests)"
    if unfinished:
        yield f"what was saved so far of a task that is not finished ({begun.name})"
    if hashes := sum(_taught(done).values()):
        yield f"fingerprints of {hashes} taught images, by which an image can be recognised and not be drawn"
    shapes = _shapes(done[-1], "learner.safetensors") if done else {}
    if statistics := [name for name in shapes if _STATISTICS.search(name)]:
        yield f"statistics of features ({len(statistics)} tensors): means or covariances of classes"
    if held := sum(shape[0] for name, shape in shapes.items() if shape and name.endswith("references.refs")):
        yield f"positions of {held} examples that may be replayed; their images stay where they lie"
    if features := sum(max([0, *(s[0] for s in _shapes(each, "features.safetensors").values() if s)]) for each in done):
        yield f"features of {features} test images"
    if any((each.folder / "answers.safetensors").is_file() for each in done):
        yield "what was answered to each test image, by its number"
    path = folder / "examples.json"
    if path.is_file():
        remedy = f"remove it, {command('resume', folder)} does not need it"
        pictures = schema.read_typed(path, Examples, remedy)["pictures"]
        yield f"{len(pictures)} small pictures of test images, with questions or captions (examples.json, report.html)"


def _taught(done: list[Checkpoint]) -> dict[int, int]:
    """How many images were taught, by their hashes, by the position of the task; none of whom it is not known."""
    beside = [(each, _shapes(each, TAUGHT)) for each in done]
    return {each.task_of(name): shape[0] for each, shapes in beside for name, shape in shapes.items() if shape}


def _shapes(checkpoint: Checkpoint, name: str) -> dict[str, list[int]]:
    folder = checkpoint.folder
    return tensor_shapes(folder / name, f"restore it, or remove {folder} to go back to the task before")
