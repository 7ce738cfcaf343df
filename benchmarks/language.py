"""A language model's training step and its evaluation against plain transformers and PEFT, as ratios in one run.

    python benchmarks/language.py
    python benchmarks/language.py --backbone 'mllm(path="build/pocket-mllm")' --batch-size 4 --turns 3 --later 0
    python benchmarks/language.py --backbone 'mllm(path="build/pocket-mllm", dtype="bfloat16")' --only evaluation

Pictures and questions are made here. Both sides train LoRA of one rank on q and v of the language model, in float32, on
the same batches: as perdure is by itself, with images and texts read once (`once`; PEFT's are tokenised before, too,
but it computes the vision tower in every step), and as beyond its budget of memory (`in every step`, on both sides).
One thread's own time, in turns, medians; so what else the machine does meets both alike. Memory is what steps take at
most in a process of their own, files left out; Linux only.
"""

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from perdure.backbones.dialogue import collate
from perdure.core import caching
from perdure.core.learner import Core
from perdure.experiments.step_cost import TURN, TimedLearner
from perdure.objectives.generate import Generate
from perdure.streams import build_stream
from perdure.training.config import RunConfig, make_backbone, make_method
from perdure.training.runtime import Runtime
from perdure.types import Task

RANK, TOKENS, QUESTIONS = 8, 6, 40
ASKED = "What colour is it?", "Which colour has the picture?", "Name the colour.", "What is its colour, in one word?"
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30), "grey": (120, 120, 120)}
RUNTIME = Runtime("cpu", "fp32", "sdpa", 1)


def written(folder: Path, tasks: int, count: int, about: int = 1) -> str:
    """A stream of questions about the colour of pictures, `about` of them in other words about each."""
    for task in range(tasks):
        for part in ("train", "test"):
            rows = []
            for i in range(count):
                shown = i // about
                said, colour = list(COLOURS.items())[shown % len(COLOURS)]
                name = f"{task}-{part}-{shown}.png"
                Image.new("RGB", (112, 112), tuple(min(255, c + shown % 50) for c in colour)).save(folder / name)
                asked = ASKED[i % about % len(ASKED)]
                turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": said}]
                rows.append({"image": name, "conversations": turns})
            (folder / f"{task:02}.{part}.json").write_text(json.dumps(rows))
    return f"conversations(path={str(folder)!r})"


class Plain:
    """Transformers and PEFT: the whole model in every step, logits of all tokens; `backbone` itself is adapted."""

    def __init__(self, backbone: Any, task: Task, size: int) -> None:
        language = backbone.towers()["language"].removeprefix("model.")
        sites = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=rf"{language}.*\.(q_proj|v_proj)")
        self.model = get_peft_model(backbone.model, sites)
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], 1e-3, fused=True)
        self.backbone, self.data, self.size = backbone, task.train, size
        self.batches = [self.read(step) for step in range(len(task.train) // size)]

    def read(self, step: int) -> dict[str, Any]:
        """A batch as the model takes it."""
        start = step % (len(self.data) // self.size) * self.size
        examples = self.backbone.tokens(self.data.__getitems__(range(start, start + self.size)))
        inputs = collate(examples, "right", self.backbone.dialogue.pad)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, each in enumerate(examples):
            labels[row, : each.prompt] = -100
        return inputs | {"labels": labels}

    def turn(self, anew: bool = False) -> list[float]:
        """Seconds of a few steps; `anew`: each makes its batch of texts and images."""
        ticks = [time.process_time()]
        for step in range(TURN + 1):
            self.optimizer.zero_grad()
            batch = self.read(step) if anew else self.batches[step % len(self.batches)]
            self.model(**batch).loss.backward()
            self.optimizer.step()
            ticks.append(time.process_time())
        return [after - before for before, after in itertools.pairwise(ticks[1:])]


def timed(config: RunConfig, tasks: int, once: bool = True) -> Callable[[], list[float]]:
    """Turns of a learner in its last task; `once`: what a frozen tower sees is kept."""

    def turn() -> list[float]:
        caching._MOST_KEPT = usual if once else 0
        try:
            return made.turn()
        finally:
            caching._MOST_KEPT = usual

    usual = caching._MOST_KEPT
    made = TimedLearner(config, RUNTIME, tasks=tasks)
    turn()
    return turn


def ratio(mine: Callable[[], list[float]], theirs: Callable[[], list[float]], turns: int) -> str:
    """The median over turns, and both medians."""
    pairs = [(statistics.median(mine()), statistics.median(theirs())) for _ in range(turns)]
    middle = statistics.median(a / b for a, b in pairs)
    a, b = (1000 * statistics.median(each) for each in zip(*pairs, strict=True))
    return f"{middle:.2f}   {a:.1f} ms against {b:.1f} ms"


def evaluated(backbone: Any, task: Task) -> list[str]:
    """An evaluation, and the next of the same images, against `generate` of one conversation after another."""
    learner = Core(backbone, Generate(tokens=TOKENS), make_method("probe"), "domain")
    learner.grow(task)
    mine = []
    with learner.inference():
        for _ in range(2):
            start = time.process_time()
            together = learner.objective.answers(learner, learner.cache.test(task.test))
            mine.append(time.process_time() - start)
        start, alone = time.process_time(), []
        for i in range(len(task.test)):
            asked = [each.with_answer(()) for each in backbone.tokens(task.test.__getitems__([i]))]
            inputs = collate(asked, "left", backbone.dialogue.pad)
            said = backbone.model.generate(**inputs, max_new_tokens=TOKENS)
            text = backbone.dialogue.tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            alone.append(text.strip())
        theirs = time.process_time() - start
    equal = sum(a == b for a, b in zip(together, alone, strict=True))
    same = f"{equal} of {len(alone)} answers equal"
    return [
        f"{which}  {theirs / own:.1f} x faster   {own:.2f} s against {theirs:.2f} s, {same}"
        for which, own in zip(("the first time", "after each later task"), mine, strict=True)
    ]


def compared(backbone: Any) -> None:
    """Print how evaluations compare with one question an image, and with several."""
    for about in (1, len(ASKED)):
        with tempfile.TemporaryDirectory() as folder:
            asked = written(Path(folder), 1, QUESTIONS, about)
            for line in evaluated(backbone, build_stream(asked, backbone.preprocess, 0).tasks[0]):
                print(f"evaluation, {about} questions about an image, {line}", flush=True)


def anonymous() -> int:
    """Bytes of memory that stand for no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def most(turn: Callable[[], object]) -> int:
    """The same at most while `turn` runs."""
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    turn()
    done.set()
    watcher.join()
    return max(seen)


def peak(options: argparse.Namespace, who: str) -> int:
    """What training takes at most, in a process of its own."""
    words = [sys.executable, __file__, "--backbone", options.backbone, "--batch-size", str(options.batch_size)]
    found = subprocess.run([*words, "--later", "0", "--only", who], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny_mllm(dim=64, size=112)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--later", type=int, default=20, help="the task whose step is compared with the first; 0: none")
    parser.add_argument(
        "--only", choices=("evaluation", "perdure", "plain"), help="evaluations, or the most memory that steps take"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        stream = written(Path(folder), max(2, options.later), (TURN + 1) * size)
        config = RunConfig(
            stream=stream,
            backbone=options.backbone,
            method=f"lora(rank={RANK}, at='qv', tower='language')",
            objective=f"generate(tokens={TOKENS})",
            batch_size=size,
            epochs=2,
            precision="fp32",
            device="cpu",
        )
        if options.only == "perdure":
            turn = timed(config, 1)
            print(most(turn))
            return
        backbone = make_backbone(options.backbone)
        if options.only == "evaluation":
            compared(backbone)
            return
        task = build_stream(stream, backbone.preprocess, 0).tasks[0]
        if options.only == "plain":
            plain = Plain(backbone, task, size)
            plain.turn()
            print(most(plain.turn))
            return
        plain = Plain(copy.deepcopy(backbone), task, size)
        plain.turn()
        for name, once in (("once", True), ("in every step", False)):
            theirs = partial(plain.turn, anew=not once)
            print(f"step, images and texts read {name} / PEFT  {ratio(timed(config, 1, once), theirs, options.turns)}")
        if options.later:
            first, last = timed(config, 1), timed(config, options.later)
            print(f"step of task {options.later} / of task 1  {ratio(last, first, options.turns)}")
        compared(backbone)
        mine, theirs = peak(options, "perdure"), peak(options, "plain")
        print(f"peak memory / PEFT  {mine / theirs:.2f}   {mine / 1e6:.0f} MB against {theirs / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
