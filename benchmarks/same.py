"""Whether the code still computes the same numbers: writes the results of short runs, or compares with written ones.

    python benchmarks/same.py write before.json
    python benchmarks/same.py compare before.json

Nine sums of methods, each on `tiny()` and on `pocket()`, three short tasks, one thread, eager attention, fp32, seed 0.
What is compared, bit for bit: the matrix of scores, and what the learner answers for eight random pictures after it was
loaded. Both calls on the same machine: kernels round differently from one processor to another.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from perdure.api.learner import Learner
from perdure.training.config import RunConfig
from perdure.training.run import run

METHODS = {
    "inflora(rank=4)": "classify",
    "fm_lora(rank=4)": "classify",
    "lora(rank=4) + ewc": "classify",
    "coda_prompt": "classify",
    "lora(rank=4) + derpp(size=12)": "classify",
    "ranpac(dim=64)": "classify",
    "probe + align": "classify",
    "finetune(tower='both') + zscl + weight_average": "zeroshot",
    "lora(rank=4, tower='both') + lwf": "retrieve",
}


def measured(method: str, objective: str, backbone: str) -> dict[str, Any]:
    """The matrix of scores of one run, and its learner's answers."""
    stream = "synthetic(tasks=3, classes_per_task=3, per_class=12, test_per_class=20, noise=0.7)"
    settings: dict[str, Any] = {
        "stream": "captions_synthetic(tasks=3, test_per_task=12)" if objective == "retrieve" else stream,
        "backbone": "tiny(text=True)" if backbone == "tiny" and objective != "classify" else f"{backbone}()",
        "objective": objective,
    }
    config = RunConfig(
        method=method, epochs=2, batch_size=12, lr=3e-3, precision="fp32", attention="eager", device="cpu", **settings
    )
    with tempfile.TemporaryDirectory() as folder:
        matrix = run(config, Path(folder) / "run")["matrix"]
        learner = Learner.load(Path(folder) / "run")
    pictures = torch.randint(256, (8, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    answers = learner.search(pictures, "a red disc") if objective == "retrieve" else learner.predict(pictures)
    return {"matrix": matrix, "answers": json.loads(json.dumps(answers))}


def main() -> None:
    torch.set_num_threads(1)
    verb, path = sys.argv[1], Path(sys.argv[2])
    found = {f"{b}: {m}": measured(m, objective, b) for b in ("tiny", "pocket") for m, objective in METHODS.items()}
    if verb == "write":
        path.write_text(json.dumps(found, indent=1))
        return
    written = json.loads(path.read_text())
    different = [name for name in found if found[name] != written.get(name)]
    print("\n".join(f"different: {name}" for name in different) or f"all {len(found)} the same")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
