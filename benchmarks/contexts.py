"""A language model that reads longer contexts: answers by what stands before a question, before and after a lesson.

    python benchmarks/contexts.py --backbone 'mllm(path="build/pocket-mllm")' --questions QUESTIONS/test.parquet

Each question is about the last of several images; those before it are other questions' and only take room. The model
reads as many tokens as it has positions for, or, with rotary positions scaled (`rope=`, `factor=`), more. It is then
taught easy-vqa's colours behind a few images. Asked without any image before its own is what is kept of the original
setting. Strict scores in per cent; "-" where the context is refused, for it has more tokens than positions.
"""

import argparse
import itertools
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import easy_vqa
import pyarrow.parquet as pq

from perdure.api.learner import Learner
from perdure.process import plain
from perdure.streams import build_stream

Asked = tuple[Path, str, str]
"""An image, a question about it and the answer."""


def held_out(file: Path, count: int, folder: Path, seed: int) -> list[Asked]:
    """Questions about `count` images, one each, from all over the file; the images are written to `folder`."""
    rows = {row["image"]["bytes"]: row for row in pq.read_table(file).to_pylist()}
    found = []
    for number, row in enumerate(random.Random(seed).sample(list(rows.values()), count)):
        (image := folder / f"held-{number}.jpg").write_bytes(row["image"]["bytes"])
        found.append((image, row["question"], row["answer"]))
    return found


def colours(part: str, count: int, seed: int) -> list[Asked]:
    """Questions of easy-vqa about the colour of `count` images."""
    if part == "train":
        (questions, answers, numbers), paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        (questions, answers, numbers), paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    asked = {
        number: (Path(paths[number]), question, answer)
        for question, answer, number in zip(questions, answers, numbers, strict=True)
        if question.startswith("what color")
    }
    return random.Random(seed).sample(list(asked.values()), count)


def written(part: str, asked: Sequence[Asked], before: int, folder: Path, seed: int) -> Path:
    """A file of conversations in which `before` images of other questions stand before each one's own."""
    drawn, rows = random.Random(before + 1000 * seed), []
    for own, question, answer in asked:
        others = drawn.choices([image for image, _, _ in asked if image != own], k=before)
        turns = [("human", "<image>\n" * (before + 1) + question), ("gpt", answer)]
        shown = [str(image.resolve()) for image in (*others, own)]
        rows.append({"image": shown, "conversations": [{"from": who, "value": said} for who, said in turns]})
    folder.mkdir(exist_ok=True)
    (file := folder / f"asked.{part}.json").write_text(json.dumps(rows))
    return file


def strict(learner: Learner, file: Path) -> float | None:
    """Per cent of the answers in `file` that are right; None where its contexts are too long."""
    try:
        [task] = build_stream(f'conversations(path="{file.parent}")', learner.backbone.preprocess, 0).tasks
        [found] = learner.objective.evaluate(learner, [task])
    except ValueError as error:
        if "tokens" not in str(error):
            raise
        return None
    return 100 * float(found["strict"])


@plain()
def main() -> None:
    """Print a line of JSON a measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--questions", type=Path, required=True, help="parquet file with image, question, answer")
    parser.add_argument("--method", default='lora(tower="language")')
    parser.add_argument("--rope", nargs="+", default=["its own", "linear", "ntk", "yarn"])
    parser.add_argument("--factor", type=float, default=2.0)
    parser.add_argument("--before", nargs="+", type=int, default=[0, 3, 7, 15, 31], help="images before each one's own")
    parser.add_argument("--taught-behind", type=int, default=3, help="images before each one's own in the lesson")
    parser.add_argument("--count", type=int, default=40, help="questions asked of each kind")
    parser.add_argument("--lessons", type=int, default=160, help="questions taught")
    parser.add_argument(
        "--seed", type=int, default=0, help="draws the questions, what stands before them, and training"
    )
    options = parser.parse_args()
    seed = options.seed
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kinds = {
            "held out": held_out(options.questions, options.count, folder, seed),
            "colours": colours("test", options.count, seed),
        }
        train = colours("train", options.lessons, seed)
        files = {}
        for kind, before in itertools.product(kinds, options.before):
            files[kind, before] = written("test", kinds[kind], before, place := folder / f"{kind}-{before}", seed)
            written("train", train[:1], 0, place, seed)  # a stream has something to learn
        lesson = written("train", train, options.taught_behind, folder / "lesson", seed)
        for rope in options.rope:
            scaled = f", rope={rope!r}, factor={options.factor})" if rope != "its own" else ")"
            learner = Learner.create(
                options.backbone.rstrip(")") + scaled, options.method, "generate(tokens=8)", precision="bf16", seed=seed
            )
            for when in ("before", "after"):
                if when == "after":
                    learner.learn(str(lesson), lr=1e-3, epochs=2, batch_size=4)
                for (kind, before), file in files.items():
                    row = {"seed": seed, "positions": rope, "lesson": when, "asked": kind, "images": before + 1}
                    print(json.dumps(row | {"strict": strict(learner, file)}), flush=True)


if __name__ == "__main__":
    main()
