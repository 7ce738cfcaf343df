"""The numbers that a report shows: what each is called, and what it says to someone who reads it for the first time."""

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from perdure import metrics

if TYPE_CHECKING:
    from perdure.reporting.runs import RunResults

_CALLED = {metrics.RECALL: "recall", metrics.SAID: "score"}

# A number's key in summary.json, its name, and what it says to someone who reads it for the first time.
_NUMBERS = (
    ("acc", "Final accuracy", "Mean accuracy over all tasks after the last one was learnt. Higher is better."),
    ("aaa", "Average accuracy", "The same mean taken after every task, then averaged: quality along the way."),
    ("new_task_acc", "New-task accuracy", "Mean accuracy on each task right after it was learnt. Higher is better."),
    ("forgetting", "Forgetting", "How many points old tasks fell below their best, on average. Lower is better."),
    ("bwt", "Backward transfer", "Change of old tasks since they were learnt. Negative means forgetting."),
    ("fwt", "Forward transfer", "Gain on a task before it is learnt, over the model that has learnt nothing."),
    ("retention", "Retention", "Share of an old task's first accuracy that is still there at the end."),
    (
        "acc_with_task_id",
        "Accuracy with task given",
        "Final accuracy when the model is told which task an image is from.",
    ),
    ("task_id_acc", "Task recognised", "How often the answer belongs to the image's own task, right class or not."),
    ("gap", "Gap", "Accuracy with task given minus final accuracy: what confusing the tasks costs."),
    (
        "feature_drift",
        "Feature drift",
        "How far features of old test images moved since their task was learnt, relative to their length. 0 is best.",
    ),
    ("trainable_parameters", "Trainable parameters", "Numbers that training may change, in the last task."),
    ("stored_bytes", "Stored", "All that was learnt, with images a memory refers to, without the pre-trained model."),
    ("seconds", "Time", "Preparing, training, finishing and evaluating all tasks."),
    ("evaluation_seconds", "Evaluation", "The part of it in which tasks and held-out data were measured."),
    ("images_per_second", "Images per second", "Speed of training."),
    ("peak_rss_bytes", "Peak memory", "Most main memory that the run used at once."),
)
STEP = (
    "step_cost",
    "Step",
    "A training step of the second task, as a multiple of plain LoRA's; without what is done once a task.",
)
# Numbers that only some runs have: of sequences of data sets, of few-shot streams, and with held-out data.
_RARE = (
    (
        "transfer",
        "Transfer",
        "Mean accuracy on data sets not learnt yet (MTIL's Transfer): what is left of zero-shot accuracy, or gained.",
    ),
    (
        "average",
        "Average over the whole matrix",
        "Mean accuracy on all data sets after every task (MTIL's Avg); its Last is the final accuracy.",
    ),
    (
        "performance_drop",
        "Performance drop",
        "Few-shot: accuracy on all test images of the classes seen, after the base task minus in the end. Lower is "
        "better.",
    ),
    (
        "harmonic_mean",
        "Harmonic mean of old and new",
        "Few-shot: of the final accuracies on base classes and on all later ones. 0 for who learns nothing new.",
    ),
    (
        "anytime_acc",
        "Anytime accuracy",
        "Of a pass without borders: mean accuracy on the tasks that had begun, averaged over the way. Higher is "
        "better.",
    ),
    (
        "zero_shot_ratio",
        "Zero-shot accuracy kept",
        "Accuracy in the end on held-out data sets relative to the pre-trained model's, mean over the sets.",
    ),
    (
        "lenient_acc",
        "Final lenient score",
        "The same where the truth is in what is said, in whatever form. Far above strict: a forgotten form.",
    ),
    (
        "lenient_forgetting",
        "Lenient forgetting",
        "Forgetting of the lenient score: knowledge that is gone, not its form.",
    ),
    ("empty", "Empty answers", "Share in the end, mean over tasks. They are wrong."),
    (
        "unparsable",
        "Unparsable answers",
        "Share in the end of answers from which nothing could be read. They are wrong.",
    ),
    (
        "answers_kept_strict",
        "Held-out answers kept, strict",
        "Score in the end on held-out questions relative to the pre-trained model's, mean over the sets.",
    ),
    ("answers_kept_lenient", "Held-out answers kept, lenient", "The same of the lenient score."),
)


def numbers_named(score: str, rare: Container[str]) -> tuple[tuple[str, str, str], ...]:
    """Key in summary.json, name and meaning of each number.

    Args:
        score: what tasks are scored by: "accuracy", "recall" where images and captions were ranked, "score" of answers.
        rare: keys of numbers that only some runs have, and these do.
    """
    first, *others = _NUMBERS if score == "accuracy" else _worded(score)
    return (first, *(each for each in _RARE if each[0] in rare), *others)


_OWN = {
    "recall": {
        "acc": "Mean of recall at 1, 5 and 10 in both directions, searched among all tasks learnt. Higher is better.",
        "acc_with_task_id": "Final recall when only the images and captions of the query's own task are searched.",
        "gap": "Recall on the own gallery minus that among all tasks: what the larger gallery costs.",
    },
    "score": {
        "acc": "Mean strict score over all tasks after the last one: in the form that was asked for. Higher is better.",
    },
}
_ABSENT = {
    "recall": ("task_id_acc",),
    "score": ("task_id_acc", "acc_with_task_id", "gap"),
}


def _worded(score: str) -> tuple[tuple[str, str, str], ...]:
    """`_NUMBERS` as they are of rankings, or of answers."""
    own, told = _OWN[score], "Recall on the own gallery"
    return tuple(
        (
            key,
            told if key == "acc_with_task_id" else name.replace("accuracy", score),
            own.get(key, text.replace("accuracy", score)),
        )
        for key, name, text in _NUMBERS
        if key not in _ABSENT[score]
    )


def score_of_all(runs: "Sequence[RunResults]") -> str:
    """What tasks are scored by in all of `runs`, as `numbers_named` takes it."""
    kinds = {run.scored for run in runs}
    return _CALLED.get(kinds.pop(), "accuracy") if len(kinds) == 1 else "accuracy"
