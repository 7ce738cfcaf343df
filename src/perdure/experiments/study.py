"""The study of a search on disk: `study.json` says what is searched, `study.log` what was proposed and measured."""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.storage import schema

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

STUDY = "study.json"
JOURNAL = "study.log"
_RESTORE = "restore it, or search anew in another folder"


@contextlib.contextmanager
def nothing_begun_nothing_left(out: Path) -> Iterator[None]:
    """A search that ends before its first trial has begun leaves the folder to a better one."""
    new = not ((out / STUDY).exists() or (out / JOURNAL).exists())
    try:
        yield
    finally:
        if new and not any(out.glob("trial-*/run.json")):
            for name in (STUDY, JOURNAL):
                (out / name).unlink(missing_ok=True)


def tuned_on(out: Path, seeds: Sequence[int]) -> str:
    """A warning for who reports, in `out`, class orders on which a study there or above chose options; else empty."""
    for folder in (out, *out.parents):
        if (folder / STUDY).is_file():
            order = read_study(folder)["order_seed"]
            if order in seeds:
                return (
                    f"seed {order} is the class order on which {folder} chose the options: its score is too good; "
                    "leave it out of what you report"
                )
            return ""
    return ""


def read_study(folder: Path) -> dict[str, Any]:
    """`study.json` of a folder."""
    path = folder / STUDY
    found = schema.decode_json(path.read_bytes(), str(path), _RESTORE)
    if not isinstance(found, dict) or not isinstance(found.get("order_seed"), int):
        raise schema.Damaged(f"{path} is damaged: it does not say on which class order was searched; {_RESTORE}")
    return found


def open_study(optuna: Any, out: Path) -> "Study":
    """The journal of a folder, which is locked, as Optuna's study; a new one where there is none."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    journal = str(out / JOURNAL)
    _check_journal(out / JOURNAL)
    for left in out.glob(f"{JOURNAL}.lock*"):  # by a killed process, which Optuna would wait half a minute for
        left.unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal)))
    study: Study = optuna.create_study(
        study_name="perdure",
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    return study


def next_trial(optuna: Any, study: "Study", seed: int) -> "Trial":
    """The next trial, whose options depend on `seed` and on the trials that are behind us.

    Not on how many there were since the process began: a search that was killed proposes what it would have.
    """
    study.sampler = optuna.samplers.TPESampler(seed=(seed + done_of(study)) % 2**31)
    return study.ask()


def propose_again(optuna: Any, study: "Study", names: Collection[str]) -> None:
    """Of a killed search: the options that were in work are proposed once more, and their run goes on.

    Where not all of `names` had been drawn yet, none is: they are drawn anew, the same ones.
    """
    states = optuna.trial.TrialState
    waiting = [each.system_attrs.get("fixed_params") for each in study.get_trials(states=(states.WAITING,))]
    for old in study.get_trials(states=(states.RUNNING,)):
        if {*old.params} == {*names} and old.params not in waiting:  # else the kill came between these two lines
            study.enqueue_trial(old.params)
        study.tell(old.number, state=states.FAIL)


def _check_journal(path: Path) -> None:
    """A line that a kill cut short is dropped; any other that is no JSON object is damage."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        if not isinstance(schema.decode_json(line, f"{path}, line {number}", _RESTORE), dict):
            raise schema.Damaged(f"{path}, line {number}: expected a JSON object; {_RESTORE}")


def check_same(out: Path, asked: Mapping[str, Any]) -> None:
    """Raise a ValueError where the study in `out` was asked for something else."""
    if not (out / STUDY).is_file():
        return
    written = read_study(out)
    before, now = ({**each, **each.get("config", {})} for each in (written, json.loads(json.dumps(asked))))
    for key, value in now.items():
        if key != "config" and before.get(key) != value:
            raise ValueError(
                f"{out} holds a study with {key}={json.dumps(before.get(key))}, not {json.dumps(value)}: give the "
                "same options to go on, or another --out to start anew"
            )


def done_of(study: "Study") -> int:
    """Trials that are behind us: finished, given up, or impossible."""
    return sum(
        t.state.name in ("COMPLETE", "PRUNED") or "error" in t.user_attrs for t in study.get_trials(deepcopy=False)
    )


def complete_of(study: "Study") -> "list[FrozenTrial]":
    """Trials that were finished."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]


def best_score(study: "Study") -> float | None:
    """The best score so far."""
    return max((trial.value for trial in complete_of(study) if trial.value is not None), default=None)


def errors_of(study: "Study") -> list[str]:
    """What was wrong with the trials that could not be run."""
    return [trial.user_attrs["error"] for trial in study.get_trials(deepcopy=False) if "error" in trial.user_attrs]


@contextlib.contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Optuna without its own lines: what is worth telling is told by `progress`."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
