"""Few-shot streams: a base task, sessions of few classes with few images, and their numbers."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perdure.backbones.preprocess import Preprocess
from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.metrics import harmonic_means, session_accuracies
from perdure.objectives.classify import Classify
from perdure.reporting.papers import write_tables
from perdure.streams import build_stream
from perdure.streams.few_shot import fewshot
from perdure.streams.synthetic import synthetic
from perdure.training.config import make_method
from perdure.training.loop import TrainConfig, fit_task

SIZE = Preprocess(size=8, resize=8, interpolation="bilinear")
NUMBERS = [f"{c:03d}" for c in range(10)]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ten classes of seven train and two test images: as class folders, CSV files, and the folder of CUB-200.

    Of miniImageNet images lie in one folder, and lists with their names alone in another.
    """
    root = tmp_path_factory.mktemp("few")
    lines: dict[str, list[str]] = {"images.txt": [], "train_test_split.txt": [], "train.csv": ["filename,label"]}
    mini = {"train.csv": ["filename,label"], "test.csv": ["filename,label"]}
    for c in NUMBERS:
        for i in range(9):
            part, name = "train" if i < 7 else "test", f"{c}.bird {c}/{i}.png"
            picture = Image.new("RGB", (8, 8), (25 * int(c), 25 * i, 0))
            mini[f"{part}.csv"].append(f"n{c}{i:08d}.png,n{c}")
            files = root / "folders" / part / name, root / "cub/images" / name, root / f"mini/images/n{c}{i:08d}.png"
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
            number = len(lines["images.txt"]) + 1
            lines["images.txt"].append(f"{number} {name}")
            lines["train_test_split.txt"].append(f"{number} {int(part == 'train')}")
            lines["train.csv"].append(f"images/{name},{c}")
    for name, text in lines.items():
        (root / "cub" / name).write_text("\n".join(text) + "\n")
    (root / "mini/split").mkdir()
    for name, text in mini.items():
        (root / "mini/split" / name).write_text("\n".join(text) + "\n")
    lists, pictures = str(root / "mini/split"), str(root / "mini/images")
    return {
        "folders": f"images(path={str(root / 'folders')!r})",
        "csv": f"csv(path={str(root / 'cub/train.csv')!r}, image='filename', label='label')",
        "mini": f"csv(path={lists!r}, image='filename', images={pictures!r})",
        "cub": f"cub200(path={str(root / 'cub')!r})",
    }


@pytest.mark.parametrize("layout", ["folders", "csv", "mini", "cub"])
def test_a_base_has_all_images_of_its_classes_and_a_session_few_of_few(layout: str, layouts: dict[str, str]) -> None:
    stream = build_stream(f"fewshot({layouts[layout]}, shots=3, ways=2)", SIZE, 0)
    assert [len(task.classes) for task in stream] == [6, 2, 2]
    assert [c for task in stream for c in task.classes] == list(range(10))
    assert [len(task.train) for task in stream] == [6 * 7, 6, 6]
    assert [len(task.test) for task in stream] == [6 * 2, 2 * 2, 2 * 2]
    for task in stream.tasks[1:]:
        assert torch.bincount(task.train.labels).tolist()[-2:] == [3, 3]
        assert set(task.test.labels.tolist()) == set(task.classes)
    assert stream.notes["few_shot"] == {"base": 6, "ways": 2, "shots": 3}
    assert stream.notes["train_images"] == [6 * 7, 6, 6]
    assert [name for task in stream for name in task.names] == stream.notes["classes"]


def test_which_images_are_the_shots_follows_from_names_and_the_draw_alone(layouts: dict[str, str]) -> None:
    def shots(seed: int, **more: Any) -> dict[str, set[str]]:
        options = {"shots": 3, "ways": 9, "base": 1} | more
        stream = fewshot(layouts["folders"], **options)(SIZE, seed)
        data, names = stream.tasks[1].train, dict(zip(stream.tasks[1].classes, stream.tasks[1].names, strict=True))
        found: dict[str, set[str]] = {}
        for row, label in zip(data.rows.tolist(), data.labels.tolist(), strict=True):
            found.setdefault(names[label], set()).add(data.source.key(row))
        return found

    first, second, drawn = shots(0), shots(1), shots(0, draw=1)
    both = first.keys() & second.keys()
    assert len(both) >= 8
    assert all(first[name] == second[name] for name in both)
    assert first.keys() == drawn.keys()
    assert first != drawn
    assert all(shots(0, shots=2)[name] < few for name, few in first.items())


@pytest.mark.parametrize(("classes", "options", "sizes"), [
    (100, {}, [60, *[5] * 8]),
    (200, {"ways": 10, "base": 100}, [100, *[10] * 10]),
    (200, {"ways": 10}, [120, *[10] * 8]),
    (13, {"ways": 2}, [9, 2, 2]),
    (5, {"ways": 1, "base": 1}, [1, 1, 1, 1, 1]),
])  # fmt: skip
def test_classes_divide_as_in_the_literature(classes: int, options: dict[str, int], sizes: list[int]) -> None:
    stream = fewshot(f"synthetic(classes_per_task={classes}, per_class=5, test_per_class=1, size=1)", **options)
    assert [len(task.classes) for task in stream(SIZE, 0)] == sizes


REFUSED = {
    "synthetic(classes_per_task=10, per_class=4), ways=2": "'picture 6' has 4 train images, fewer than shots=5",
    "synthetic(classes_per_task=10), ways=2, base=5": "10 classes, which are not base=5 and sessions of ways=2",
    "synthetic(classes_per_task=10), ways=5": "three fifths of the classes and sessions of ways=5: give a base",
    "synthetic(classes_per_task=10), ways=10": "sessions of ways=10: give fewer ways$",
    "synthetic(classes_per_task=10), ways=10, base=10": "base=10 and sessions of ways=10: give a smaller base",
    "synthetic(tasks=5)": "tasks=5 has no effect on 'synthetic' in fewshot, which says what the tasks are",
    "cifar100(increments=(50, 50))": "increments=.* has no effect on 'cifar100' in fewshot",
    "captions_synthetic()": "fewshot: captions_synthetic is no stream of labelled images in one task",
    "synthetic(), synthetic()": "fewshot of 2 streams: expected one",
    "": "fewshot of 0 streams: expected one",
}


@pytest.mark.parametrize(("stream", "message"), REFUSED.items())
def test_what_cannot_be_divided_is_refused_in_one_line(stream: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build_stream(f"fewshot({stream})", SIZE, 0)
    assert "\n" not in str(error.value)


def test_where_nothing_is_learnt_no_class_has_too_few_images() -> None:
    stream = build_stream("fewshot(synthetic(classes_per_task=10, per_class=4), ways=2)", SIZE, 0, measured=True)
    assert [len(task.train) for task in stream] == [6 * 4, 2 * 4, 2 * 4]


def test_a_stream_given_in_python_must_be_one_task() -> None:
    with pytest.raises(ValueError, match="in one task; give one of these"):
        fewshot(synthetic(tasks=2), ways=2)(SIZE, 0)
    assert len(fewshot(synthetic(tasks=1, classes_per_task=10), ways=2)(SIZE, 0)) == 3


def test_accuracies_and_harmonic_means_by_hand() -> None:
    matrix = [[0.8, None, None], [0.6, 0.5, None], [0.5, 0.2, 0.4]]
    assert session_accuracies(matrix, (60, 20, 20)) == pytest.approx([0.8, 0.575, 0.42])
    assert harmonic_means(matrix, (60, 20, 20))[0] is None
    assert harmonic_means(matrix, (60, 20, 20))[1:] == pytest.approx([2 * 0.6 * 0.5 / 1.1, 2 * 0.5 * 0.3 / 0.8])
    assert harmonic_means([[0.8, None], [0.0, 0.0]], (1, 1)) == [None, 0.0]
    assert session_accuracies([[None, None], [0.5, None]], (1, 1)) == [None, None]


@pytest.mark.parametrize("method", ["ncm", "ranpac(dim=64)", "probe + align", "lora(rank=2) + lamaml(size=20)"])
def test_a_few_shot_run_and_its_controls_tell_its_numbers_and_resume(
    method: str, lab: Any, content_of: Any, tmp_path: Path
) -> None:
    few = {"stream": "fewshot(synthetic(classes_per_task=6, per_class=8, test_per_class=4), ways=2, shots=2)"}
    summary = lab.run(method, tmp_path / "unbroken", **few)
    lab.broken_run(method, tmp_path / "broken", (0, None), (1, 1), save_every=1, **few)
    assert content_of(tmp_path / "broken") == content_of(tmp_path / "unbroken")
    after = session_accuracies(summary["matrix"], (16, 8))
    assert summary["few_shot"]["accuracies"] == after
    assert summary["performance_drop"] == pytest.approx(after[0] - after[1])
    assert summary["harmonic_mean"] == summary["few_shot"]["harmonic_means"][-1]
    write_tables([tmp_path / "unbroken"], tmp_path / "tables", as_csv=True, as_latex=True)
    (row,) = csv.DictReader((tmp_path / "tables/runs.csv").read_text().splitlines())
    assert float(row["performance_drop"]) == pytest.approx(summary["performance_drop"], abs=1e-5)
    assert float(row["harmonic_mean"]) == pytest.approx(summary["harmonic_mean"], abs=1e-5)
    assert "anytime_acc" not in row
    heading = (tmp_path / "tables/methods.tex").read_text().splitlines()[2]
    assert "Performance drop & Harmonic mean" in heading


@pytest.mark.parametrize(
    ("more", "training"),
    [(" + reptile", {"lr": 2e-2, "optimizer": "sgd"}), (" + lamaml(inner_steps=2)", {"lr": 1e-2})],
)
def test_meta_learning_beats_plain_lora_after_five_shot_adaptation(more: str, training: dict[str, Any]) -> None:
    data = "fewshot(synthetic(classes_per_task=16, per_class=12, noise=0.8), shots=5, ways=4, base=8)"
    config = TrainConfig(epochs=6, batch_size=20, **training)

    def accuracy(method: str, seed: int) -> float:
        backbone = tiny(dim=32)
        stream = build_stream(data, backbone.preprocess, seed)
        learner = Core(backbone, Classify(), make_method(method), seed=seed)
        for task in stream:
            learner.grow(task)
            fit_task(learner, task, config)
        found = learner.objective.evaluate(learner, stream.tasks)
        return session_accuracies([[None] * 3, [None] * 3, [each["accuracy"] for each in found]], (8, 4, 4))[-1] or 0.0

    plain, meta = ([accuracy(f"lora(rank=4){part}", seed) for seed in (0, 1)] for part in ("", more))
    assert all(b > a for a, b in zip(plain, meta, strict=True))
    assert sum(meta) / 2 > sum(plain) / 2 + 0.08
