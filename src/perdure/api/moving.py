"""What a learner was made with lies elsewhere now: written down beside its record, once it is the same."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from perdure.api.folders import tasks_with_data
from perdure.api.learner import Learner
from perdure.api.lesson_source import found_now, paths_of, unfinished
from perdure.core import checkpoint
from perdure.core.manifests import read_record, recorded_moves
from perdure.options.paths import Relocation, moved, paths_in, relocated
from perdure.storage.files import locked
from perdure.training.config import make_backbone
from perdure.training.record import recorded_config, write_moves


def move(folder: Path, change: str, warn: Callable[[str], None]) -> list[tuple[str, str]]:
    """Put paths right that a learner's record holds; returns those that changed, as they were and as they are.

    Args:
        folder: of the learner, or the run.
        change: OLD=NEW; either may hold more such signs, for only one OLD is recorded.
        warn: is told what lies there now and is not what was learnt.

    Raises:
        ValueError: when nothing recorded was there, nothing is there now, or the backbone there is another one.
    """
    with locked(folder):
        written = read_record(folder)
        config = recorded_config(folder, written)
        done = checkpoint.whole(folder)
        lessons = [found_now(source, folder) for source in checkpoint.sources(done).values()]
        if begun := unfinished(folder, done):
            lessons.append(begun)
        texts = (config.stream, config.backbone, config.method, *config.retain)
        known = [path for text in texts for path in paths_in(text)]
        known += [path for each in lessons for path in paths_of(each)]
        step = _step(folder, change, known)
        changed = {path: relocated(path, step) for path in known if relocated(path, step) != path}
        if not any(Path(path).exists() for path in changed.values()):
            gone = next(iter(changed.values()))
            raise ValueError(f"{gone!r} does not exist: give the place where {next(iter(changed))} is now")
        backbone = moved(config.backbone, [step])
        needed, _, _ = written["backbone"]["fingerprint"].partition(" ")  # behind it stands what it was resized to
        if backbone != config.backbone and make_backbone(backbone).fingerprint().partition(" ")[0] != needed:
            raise ValueError(
                f"{backbone} is another model than {folder} was made with: give the one whose weights it needs"
            )
        write_moves(folder, [*recorded_moves(folder), step])
        if any(path in changed for each in lessons for path in paths_of(each)):
            with suppress(ValueError, OSError):  # the model may be away still, and is not needed for it
                tasks_with_data(Learner.untaught(folder), folder, done, warn)
        return list(changed.items())


def _step(folder: Path, change: str, known: list[str]) -> Relocation:
    """From where to where; of several ways to read `change` the one whose OLD is among the `known` paths."""
    places = [i for i, letter in enumerate(change) if letter == "=" and 0 < i < len(change) - 1]
    if not places:
        raise ValueError(f"{change!r}: expected OLD=NEW, such as /old/photos=/new/photos")
    read = [(Path(change[:i]).expanduser().absolute(), Path(change[i + 1 :]).expanduser()) for i in places]
    steps = [((str(old), str(new.absolute())), new) for old, new in read]
    meant = [(step, new) for step, new in steps if any(relocated(path, step) != path for path in known)]
    if not meant:
        there = ", ".join(dict.fromkeys(path for path in known if Path(path).is_absolute())) or "no path"
        raise ValueError(f"{folder} was made with nothing in {steps[0][0][0]}; what it was made with: {there}")
    if found := next((step for step, new in meant if new.exists()), None):
        return found
    raise ValueError(f"{str(meant[0][1])!r} does not exist: give the place where it is now")
