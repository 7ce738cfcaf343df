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


def test_what_no_task_knows_keeps_all_heads(lab: Any) -> None:
    bench = lab.but(per_class=40)
    learner = bench.taught("head_gates(strength=3.0)")
    noise = "synthetic(tasks=1, classes_per_task=2, per_class=32, noise=9)"
    data = build_stream(noise, bench.backbone().preprocess, 77).tasks[0].train
    images = data.__getitems__(range(len(data)))
    with learner.inference():
        taken, features = learner.method.routes(learner, images), learner.encode(images)
        assert not torch.equal(learner.encode(images | {"task": torch.zeros_like(taken)}), features)
    assert (taken < 0).any()
    assert torch.equal(features[taken < 0], bench.backbone()(images)[taken < 0])


def test_options_say_which_heads_have_gates_what_open_ones_cost_and_how_fast_they_learn(lab: Any) -> None:
    learner = lab.learner("head_gates(blocks='1', strength=0.5, gates_lr=7)")
    learner.grow(lab.stream().tasks[0])
    method = learner.method
    assert method.gates.shape == (1, 4)
    (name,) = (name for name in learner.trainable() if name.endswith("log_alpha"))
    assert method.param_groups(learner) == {name: 7}
    with torch.no_grad():
        method.gates.log_alpha.copy_(torch.tensor([[-9.0, -1.0, 2.0, 9.0]]))
    cost = HardConcrete.open(method.gates.log_alpha).sum() / 4
    torch.testing.assert_close(method.penalty(learner, {}, torch.empty(0)), 0.5 * cost)


def test_measures_tell_the_heads_of_a_task_and_those_of_any(lab: Any) -> None:
    learner = lab.taught("head_gates")
    closed = learner.method.gates.closed
    for task, heads in enumerate(([1.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0])):
        closed[str(task)] = torch.tensor([heads] * 2)
    measured = learner.method.measures(learner)
    assert (measured["heads_open"], measured["heads_open_of_any"]) == (pytest.approx(0.25), 0.5)


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
