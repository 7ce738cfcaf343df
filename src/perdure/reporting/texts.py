"""What a report says of texts: recall in the end, what is kept of zero-shot accuracy, and examples of searches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perdure import metrics
from perdure.evaluation.answer_retention import answered, share_or_points
from perdure.evaluation.examples import EXAMPLES, read_examples
from perdure.evaluation.zero_shot_retention import kept
from perdure.metrics import CUTS
from perdure.reporting.charts import percent
from perdure.reporting.runs import RunResults

_WAYS = {"i2t": "image to text", "t2i": "text to image"}
_GALLERIES = {"own": "among its own images and captions", "union": "among those of all tasks"}


def view(run: RunResults) -> dict[str, Any]:
    """Parts of a run's page; empty where it has none."""
    return {
        "recalls": _recalls(run),
        "zero_shot": _zero_shot(run),
        "answers": _answers(run),
        "searches": _searches(run),
        "asked": _asked(run),
    }


@dataclass(frozen=True)
class Square:
    """A matrix of scores as the report shows it: `before` the first task, `rows` after each, `averages` of these."""

    title: str
    about: str
    before: list[float | None]
    rows: list[list[float | None]]
    averages: list[float | None]


_SQUARES = {
    "strict": ("Strict score", "In the form that was asked for."),
    "lenient": (
        "Lenient score",
        "Whether the truth is in what is said, in whatever form. What falls above and stays here is a forgotten form; "
        "what falls in both is forgotten knowledge.",
    ),
    "empty": ("Share of empty answers", "They are wrong."),
    "unparsable": ("Share of unparsable answers", "Nothing could be read from them, and they are wrong."),
}


def matrices(run: RunResults) -> list[Square]:
    """What the report shows of each task after each task; shares that are 0 everywhere are left out."""
    done, found = run.learnt(), []
    for metric in _SQUARES if run.scored == metrics.SAID else (run.scored[0],):
        rows = run.matrix(metric)[:done]
        if done and (metric not in ("empty", "unparsable") or any(map(any, rows))):
            title, about = _SQUARES.get(metric, (metric.capitalize(), ""))
            before = metrics.baseline_of(run.rows, metric, len(run.names()))
            found.append(Square(title, about, before, rows, run.averages(metric)))
    return found


def zero_shot_kept(run: RunResults) -> list[float | None]:
    """After each task, zero-shot accuracy relative to the pre-trained model's, the mean over held-out data sets."""
    return _mean_ratios(list(kept(run.rows).values()))


def answers_kept(run: RunResults) -> list[float | None]:
    """The same of the lenient score of held-out questions."""
    return _mean_ratios([numbers["lenient"] for numbers in answered(run.rows).values() if "lenient" in numbers])


def _mean_ratios(sets: Sequence[Mapping[str, Any]]) -> list[float | None]:
    ratios = [[after / each["before"] for after in each["after"]] for each in sets if each["before"]]
    return [sum(column) / len(column) for column in zip(*ratios, strict=False)]


def _recalls(run: RunResults) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """For each gallery: what it is, headings, and the last task's recalls for each task."""
    done = run.learnt()
    if run.scored != metrics.RECALL or not done:
        return []
    found = []
    for gallery, about in _GALLERIES.items():
        names = [(way, k) for way in _WAYS for k in CUTS]
        columns = [run.matrix(f"{gallery}/{way}@{k}")[done - 1][:done] for way, k in names]
        lines = [
            (name, [*map(percent, row), "–" if None in row else f"{100 * sum(v or 0 for v in row):.0f}"])
            for name, row in zip(run.names(), zip(*columns, strict=True), strict=False)
        ]
        found.append((about, [*(f"{_WAYS[way]} @{k}" for way, k in names), "rsum"], lines))
    return found


def _zero_shot(run: RunResults) -> list[tuple[str, str, list[str], str]]:
    """For each held-out data set: accuracy before, after each task, and what is left of it."""
    return [
        (name, percent(each["before"]), [*map(percent, each["after"])], percent(each["ratio"]))
        for name, each in kept(run.rows).items()
    ]


def _answers(run: RunResults) -> list[tuple[str, list[tuple[str, bool, str, list[str], str]]]]:
    """For each held-out set its numbers: name, whether it is one of the chief ones, before, after each task, kept."""
    sets = []
    for name, numbers in answered(run.rows).items():
        lines = []
        for number, facts in numbers.items():
            before = "–" if facts["before"] is None else share_or_points(number, facts["before"])
            after = [share_or_points(number, value) for value in facts["after"]]
            kept_share = percent(facts["ratio"]) if number not in _SHARES else "–"
            called = "lenient, guarded" if number == "lenient" and "official" in numbers else number
            lines.append((called, number in _CHIEF, before, after, kept_share))
        sets.append((name, lines))
    return sets


_SHARES = ("empty", "unparsable")
_OFFICIAL = ("official", "official/total", "official/perception", "official/cognition")
_CHIEF = ("strict", "lenient", *_OFFICIAL, *_SHARES)
"""Numbers that are shown first."""


def _searches(run: RunResults) -> list[dict[str, Any]]:
    """Queries with the pictures found before and after; none while the run is not finished."""
    if not (run.folder / EXAMPLES).is_file():
        return []
    noted = read_examples(run.folder)
    pictures = noted["pictures"]
    return [
        {
            "text": query["text"],
            "task": query["task"],
            "right": pictures[str(query["pair"])],
            "found": [
                (when, [(pictures[str(pair)], pair == query["pair"]) for pair in found])
                for when, found in (("before", query["before"]), ("after", query.get("after", [])))
            ],
        }
        for query in noted.get("queries", ())
        if pictures
    ]


_WHEN = {"before": "before", "learnt": "once learnt", "end": "in the end"}


def _asked(run: RunResults) -> list[tuple[str, list[dict[str, Any]]]]:
    """For each task some of its questions, with what was answered when, and whether that was right."""
    if not (run.folder / EXAMPLES).is_file():
        return []
    noted, names = read_examples(run.folder), run.names()
    found: dict[str, list[dict[str, Any]]] = {}
    for each in noted.get("questions", ()):
        name = names[each["task"]] if each["task"] < len(names) else f"task {each['task'] + 1}"
        found.setdefault(f"{each['task'] + 1} {name}", []).append(
            {
                "question": each["question"],
                "truth": " | ".join(each["truth"]),
                "pictures": [noted["pictures"][picture] for picture in each["pictures"]],
                "said": [(_WHEN[w], each["said"][w], w in each["right"]) for w in _WHEN if w in each["said"]],
            }
        )
    return list(found.items())
