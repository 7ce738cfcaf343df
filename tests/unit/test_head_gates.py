"""Gates of attention heads: one changes nothing, a task takes few heads, and what it took stays."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.adapters.head_gates import HardConcrete, HeadGates, head_count
from perdure.backbones import BACKBONES
from perdure.backbones.tiny import tiny
from perdure.streams import build_stream
from perdure.types import Told


def gated(backbone: Any) -> HeadGates:
    gates = HeadGates()
    gates.attach(backbone, backbone.sites("o"))
    return gates


@pytest.mark.parametrize("fused", [True, False])
def test_gates_of_one_change_no_bit_and_a_closed_head_is_silent(fused: bool) -> None:
    backbone = tiny(dim=16, depth=2, fused=fused)
    image = {"image": torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.manual_seed(0))}
    before = backbone(image)
    gates = gated(backbone)
    assert torch.equal(backbone(image), before)
    with gates.using(torch.ones(2, 1, 4)):
        assert torch.equal(backbone(image), before)
    mixed = torch.ones(2, 3, 4)
    mixed[:, 1, 2] = 0
    with gates.using(mixed):
        found = backbone(image)
    assert torch.equal(found[[0, 2]], before[[0, 2]])
    columns = slice(2 * 4, 3 * 4)  # what a closed head would have written is what its columns would have read
    for block in backbone.blocks():
        backbone.get_submodule(block).attn.proj.weight.data[:, columns] = 0
    torch.testing.assert_close(found[1], backbone(image)[1])


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip", "siglip", "timm"])
def test_heads_are_counted_in_every_family(family: str, saved: Any, timm_file: Path) -> None:
    made = {
        "timm": lambda: BACKBONES["timm"]("test_vit", str(timm_file)),
        "clip": lambda: BACKBONES["clip"](str(saved["clip"])),
    }.get(family, lambda: BACKBONES["vision"](str(saved[family])))()
    assert {head_count(made, site) for site in made.sites("o")} == {2 if family == "timm" else 4}


def test_hard_concrete_gates_are_those_of_the_paper() -> None:
    log_alpha = torch.tensor([-3.0, 0.0, 3.0])
    assert HardConcrete.settled(log_alpha)[[0, 2]].tolist() == [0.0, 1.0]
    assert float(HardConcrete.settled(log_alpha)[1]) == pytest.approx(0.5)
    uniform = torch.rand(20_000, 3, generator=torch.manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    drawn = HardConcrete.draw(log_alpha.expand(20_000, 3), uniform)
    torch.testing.assert_close((drawn > 0).float().mean(0), HardConcrete.open(log_alpha), atol=0.01, rtol=0)


def test_a_task_takes_fewer_heads_at_a_cost_of_at_most_one_point(lab: Any) -> None:
    bench = lab.but(dim=32, epochs=10, scenario="task")
    described = "synthetic(tasks=3, classes_per_task=2, per_class=32, test_per_class=64, noise=0.5, scenario='task')"
    stream = build_stream(described, bench.backbone().preprocess, 0)

    def accuracy(learner: Any) -> float:
        """With the task told."""
        right = []
        for task in stream:
            columns = [learner.objective.classes.index(c) for c in task.classes]
            best = learner.scores_of(Told(task.test, task.index))[:, columns].argmax(1).cpu()
            right.append((torch.tensor(task.classes)[best] == task.test.labels).float())
        return float(torch.cat(right).mean())

    plain, sparse = (bench.teach(bench.learner(method), stream) for method in ("probe", "head_gates(strength=0.5)"))
    with plain.inference(), sparse.inference():
        assert accuracy(sparse) >= accuracy(plain) - 0.01
    assert sparse.method.measures(sparse)["heads_open"] < 0.7


def test_gates_of_old_tasks_are_frozen(lab: Any) -> None:
    learner, tasks = lab.learner("head_gates"), lab.stream().tasks
    lab.teach(learner, tasks[:1])
    before = learner.method.gates.closed["0"].clone()
    told = tasks[0].test.__getitems__(range(8)) | {"task": torch.zeros(8, dtype=torch.int64)}
    with learner.inference():
        features = learner.encode(told)
    lab.teach(learner, tasks[1:])
    assert torch.equal(learner.method.gates.closed["0"], before)
    with learner.inference():
        assert torch.equal(learner.encode(told), features)


def check(learner: Any, task: Any) -> None:
    learner.grow(task)
    learner.method.check(learner, task)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("head_gates(tower='language')", "each example has an expert in the vision tower alone"),
        ("head_gates + replay(size=4)", "replay has no effect beside head_gates"),
        ("gem(size=4) + head_gates", "gem has no effect beside head_gates"),
        ("head_gates + agem(size=4)", "agem has no effect beside head_gates"),
        ("head_gates + lora", "cannot be combined with lora"),
    ],
)
def test_what_would_have_no_effect_is_refused(method: str, said: str, lab: Any) -> None:
    with pytest.raises(ValueError, match=said):
        check(lab.learner(method), lab.stream().tasks[0])
