"""The numbers that a report shows: what each is called, and what it says to someone who reads it for the first time."""

from collections.abc import Container

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
    ("trainable_parameters", "Trainable parameters", "Numbers that training may change, in the largest task."),
    ("stored_bytes", "Stored", "All that was learnt, with images a memory refers to, without the pre-trained model."),
    ("seconds", "Time", "Preparing, training, finishing and evaluating all tasks."),
    ("images_per_second", "Images per second", "Speed of training."),
    ("peak_rss_bytes", "Peak memory", "Most main memory that the run used at once."),
)
STEP = (
    "step_cost",
    "Step",
    "A training step of the second task, as a multiple of plain LoRA's; without what is done once a task.",
)
# Numbers that only some runs have: of sequences of data sets, and with held-out ones.
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
        "zero_shot_ratio",
        "Zero-shot accuracy kept",
        "Accuracy in the end on held-out data sets relative to the pre-trained model's, mean over the sets.",
    ),
)


def numbers_named(rankings: bool, rare: Container[str]) -> tuple[tuple[str, str, str], ...]:
    """Key in summary.json, name and meaning of each number.

    Args:
        rankings: whether images and captions were ranked: recall in place of accuracy.
        rare: keys of numbers that only some runs have, and these do.
    """
    first, *others = _of_rankings() if rankings else _NUMBERS
    return (first, *(each for each in _RARE if each[0] in rare), *others)


def _of_rankings() -> tuple[tuple[str, str, str], ...]:
    """`_NUMBERS` as they are of rankings."""
    own = {
        "acc": "Mean of recall at 1, 5 and 10 in both directions, searched among all tasks learnt. Higher is better.",
        "acc_with_task_id": "Final recall when only the images and captions of the query's own task are searched.",
        "gap": "Recall on the own gallery minus that among all tasks: what the larger gallery costs.",
    }
    told = "Recall on the own gallery"
    return tuple(
        (
            key,
            told if key == "acc_with_task_id" else name.replace("accuracy", "recall"),
            own.get(key, text.replace("accuracy", "recall")),
        )
        for key, name, text in _NUMBERS
        if key != "task_id_acc"
    )
