"""What commands are given: a folder to open, images to look at; and what a learner or specialists see in them.

What they compute with is imported when they are called: their help waits for no torch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.cli.console import Screen
from perdure.formatting import shortened

if TYPE_CHECKING:
    from perdure.api.learner import Learner
    from perdure.api.specialists import Specialists
    from perdure.streams import ImageSet


def opened_and_told(folder: Path, device: str | None, screen: Screen) -> "Learner | Specialists":
    """The learner or the specialists of a folder; which of these could not be opened, or know more, is said."""
    from perdure.api.specialists import Specialists, opened

    found = opened(folder, device)
    if isinstance(found, Specialists):
        for name, why in found.missing.items():
            screen.warn(f"{name} is left out: {why}")
        for facts in found.record["members"]:
            name, member = facts["name"], found.members.get(facts["name"])
            if member is not None and (more := member.learnt - facts["learnt"]):
                screen.warn(
                    f"{name} has learnt {more} task{'s' if more > 1 else ''} since {folder} was made, which its pool "
                    "and its router do not know: combine again"
                )
    return found


def tell_learnt(folder: Path, screen: Screen) -> None:
    """Let the screen know what a folder has learnt so far, where there is one, and how it is scored."""
    from perdure.core.checkpoint import read_record, whole
    from perdure.training.summary import scored_by

    if (folder / "run.json").exists():
        done = whole(folder)
        screen.tasks = done[-1].tasks if done else ()
        screen.usual = next(iter(scored_by(read_record(folder)["config"], [""])), screen.usual)


def tell_seen(
    learner: "Learner | Specialists", images: Sequence[Path], top: int, skip_bad: bool, screen: Screen, **how: Any
) -> None:
    """Print what `learner` sees in images, and of specialists who said it; `how` as in `Learner.predict`."""
    from perdure.api.specialists import Specialists
    from perdure.backbones.preprocess import skippable

    learner.check_sees("predict")
    files, shown = shown_images(images, learner, skip_bad, screen)
    with skippable("--skip-bad"):
        if isinstance(learner, Specialists):
            routed = learner.answers(shown, top, **how)
            found = [each.labels for each in routed]
            who = [{"member": each.member, "known": each.known} for each in routed]
        else:
            found, who = learner.predict(shown, top, **how), [{} for _ in files]
    for file, answer, said in zip(files, found, who, strict=True):
        line = "  ".join(f"{shortened(name)} {share:.1%}" for name, share in answer)
        by = f"  [{said['member']}{'' if said['known'] else ', unlike what any was taught'}]" if said else ""
        screen.result(
            {"image": str(file), "labels": [{"name": n, "score": s} for n, s in answer], **said}, f"{file}  {line}{by}"
        )


def shown_images(
    paths: Sequence[Path], learner: "Learner | Specialists", skip_bad: bool, screen: Screen
) -> "tuple[list[Path], ImageSet]":
    """The image files in `paths`, and themselves; unreadable ones are told and left out when that is asked for."""
    from perdure.streams import ImageSet
    from perdure.streams.folders import told_left_out

    left_out: Counter[str] = Counter()
    files = [file for path in paths for file in images_in(path, left_out)]
    if left_out:
        screen.warn(told_left_out(left_out))
    screen.wait("looking")
    shown = ImageSet.queries(files, learner.backbone.preprocess)
    if skip_bad:
        shown = shown.readable()
        tell_skipped(shown.skipped, screen.warn)
    return [files[row] for row in shown.rows.tolist()], shown


def tell_unread(learner: "Learner | Specialists", texts: Sequence[str], screen: Screen) -> None:
    """Say of which words a text encoder knows nothing, unless the learner was taught words itself."""
    from perdure.api.learner import Learner

    if isinstance(learner, Learner):
        readers = {"": learner}
    else:
        readers = {f"{name}: ": learner.members[name] for name in learner.able("text")}
    for who, reader in readers.items():
        for line in reader.unread(texts):
            screen.warn(f"{who}{line}")


def tell_skipped(skipped: Sequence[str], tell: Callable[[str], None]) -> None:
    """Say which images could not be read."""
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        images = "image was" if len(skipped) == 1 else "images were"
        tell(f"{len(skipped)} unreadable {images} left out: {', '.join(skipped[:5])}{more}")


def images_in(path: Path, left_out: Counter[str]) -> list[Path]:
    """The image files in a folder and below, those that would be learnt, or the file itself; counts the others."""
    from perdure.streams.folders import pictures, told_left_out

    if path.is_dir():
        found = [path / file for file in pictures(path, left_out)]
        if not found:
            others = f"; {told_left_out(left_out)}" if left_out else ""
            raise ValueError(f"{path} has no image{others}; give image files, or a folder of some")
        return found
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give an image file or a folder of images")
    return [path]
