"""DualPrompt: each image's own E-prompt in training, the nearest key's at test time, and what the past keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.mechanisms.prompting import query
from perdure.training.config import make_method, make_objective
from perdure.training.loop import fit_task
from perdure.types import Task


def taught(lab: Any, spec: str = "dualprompt", tasks: int = 2, **more: Any) -> Core:
    return lab.teach(lab.learner(spec), lab.stream().tasks[:tasks], **more)


def placed(depth: int, spec: str = "dualprompt") -> tuple[list[int], list[int]]:
    """Numbers of the blocks that have G- and E-prompts."""
    learner = Core(tiny(dim=8, depth=depth), make_objective("classify"), make_method(spec))
    learner.grow(Task(0, "first", (0, 1), ("a", "b")))
    method = learner.method
    on: dict[Any, set[int]] = {method.of("vision").general: set(), method.of("vision").expert: set()}
    for number, name in enumerate(learner.backbone.blocks()):
        for hook in learner.backbone.get_submodule(f"{name}.attn")._forward_pre_hooks.values():
            on[hook.args[0]].add(number)
    return sorted(on[method.of("vision").general]), sorted(on[method.of("vision").expert])


@pytest.mark.parametrize(
    ("depth", "general", "expert"),
    [(2, [0], [1]), (3, [0], [1, 2]), (4, [0, 1], [2, 3]), (5, [0, 1], [2, 3, 4]), (7, [0, 1], [2, 3, 4])],
)
def test_prompts_stand_where_the_paper_has_them_as_far_as_there_are_blocks(
    depth: int, general: list[int], expert: list[int]
) -> None:
    assert placed(depth) == (general, expert)


def test_blocks_can_be_named_and_general_prompts_left_out() -> None:
    assert placed(4, "dualprompt(general_blocks='3', blocks='0,2')") == ([3], [0, 2])
    assert placed(5, "dualprompt(general_length=0)") == ([], [2, 3, 4])
    assert placed(1, "dualprompt(general_length=0)") == ([], [0])
    with pytest.raises(ValueError, match=r"has one block, G- and E-prompts need two: write general_length=0$"):
        placed(1)


def test_only_general_prompts_are_shared_and_only_the_current_expert_learns(lab: Any) -> None:
    learner = taught(lab, tasks=1)
    method, second = learner.method, lab.stream().tasks[1]
    first = method.of("vision").prompt.detach().clone(), method.of("vision").key.detach().clone()
    assert "method.towers.vision.shared" in learner.shared()
    assert not {"method.towers.vision.prompt", "method.towers.vision.key"} & learner.shared().keys()
    lab.teach(learner, [second])
    assert torch.equal(method.of("vision").past["prompts"], first[0][None])
    assert torch.equal(method.of("vision").past["keys"], first[1][None])
    assert not torch.equal(method.of("vision").prompt, first[0])
    assert not torch.equal(method.of("vision").key, first[1])
    trained = {n for n in learner.trainable() if n.startswith("method")}
    assert trained == {"method.towers.vision.shared", "method.towers.vision.key", "method.towers.vision.prompt"}


def test_in_training_each_image_takes_the_prompt_of_its_own_task(lab: Any) -> None:
    learner, stream = taught(lab), lab.stream()
    method = learner.method
    old, new = (stream.tasks[i].train.__getitems__(range(3)) for i in (0, 1))
    mixed = {k: torch.cat([old[k], new[k]]) for k in old}
    prompts = torch.cat(
        [
            method.of("vision").past["prompts"].expand(3, -1, -1, -1),
            method.of("vision").prompt[None].expand(3, -1, -1, -1),
        ]
    )
    learner.train()
    with (
        method.of("vision").general.using(method.of("vision").shared.unbind()),
        method.of("vision").expert.using(prompts.unbind(1)),
    ):
        expected = learner.backbone(mixed)
    torch.testing.assert_close(learner.encode(mixed), expected)
    learner.method.of("vision").batchwise = True  # which is about tests
    torch.testing.assert_close(learner.encode(mixed), expected)


def test_the_pull_is_to_the_key_of_each_images_own_task(lab: Any) -> None:
    learner, stream = taught(lab, "dualprompt(strength=0.5)"), lab.stream()
    method = learner.method
    batch = {
        k: torch.cat([stream.tasks[0].train.__getitems__([0])[k], v])
        for k, v in stream.tasks[1].train.__getitems__([0, 1, 2]).items()
    }
    asked = query(learner, batch)
    keys = torch.stack(
        [method.of("vision").past["keys"][0], method.of("vision").key, method.of("vision").key, method.of("vision").key]
    )
    expected = -0.5 * F.cosine_similarity(asked, keys).mean()
    torch.testing.assert_close(method.penalty(learner, batch, torch.empty(0)), expected)


def test_a_key_comes_nearer_to_its_tasks_queries(lab: Any) -> None:
    stream = lab.stream()
    learner = lab.learner("dualprompt")
    learner.grow(stream.tasks[0])
    batch = stream.tasks[0].train.__getitems__(range(16))
    before = F.cosine_similarity(query(learner, batch), learner.method.of("vision").key.detach()).mean()
    fit_task(learner, stream.tasks[0], lab.train_config(epochs=6))
    assert F.cosine_similarity(query(learner, batch), learner.method.of("vision").key.detach()).mean() > before + 0.2


def apart(lab: Any, spec: str) -> tuple[Core, Any]:
    """A learner of whose two keys some images are nearer to one and some to the other; and those images."""
    learner = taught(lab, spec)
    method = learner.method
    data = lab.stream().tasks[0].test
    asked = query(learner, data.__getitems__(range(len(data))))
    mean, aside = asked.mean(0), asked[0] - asked.mean(0)
    with torch.no_grad():
        method.of("vision").past["keys"] = (mean + aside)[None]
        method.of("vision").key.copy_(mean - aside)
        method.of("vision").prompt.normal_(generator=torch.Generator().manual_seed(5))
    return learner, data


def scores(learner: Core, data: Any, size: int) -> Tensor:
    with learner.inference():
        return learner.scores_of(data, size)


def test_each_image_chooses_for_itself_but_a_batch_that_votes_makes_answers_depend_on_the_batch(lab: Any) -> None:
    learner, data = apart(lab, "dualprompt")
    alone = scores(learner, data, 1)
    torch.testing.assert_close(scores(learner, data, 64), alone, rtol=1e-5, atol=1e-5)
    voting, data = apart(lab, "dualprompt(batchwise=True)")
    torch.testing.assert_close(scores(voting, data, 1), alone, rtol=1e-5, atol=1e-5)
    assert (scores(voting, data, 64) - alone).abs().max() > 1e-3
    assert voting.method.measures(voting) == {"batchwise": 1.0}
    assert learner.method.measures(learner) == {}


def test_a_new_task_starts_from_the_last_ones_key_and_prompt(lab: Any) -> None:
    learner = taught(lab, tasks=1)
    images = lab.stream().tasks[0].test
    before = scores(learner, images, 64)
    learner.grow(lab.stream().tasks[1])
    assert torch.equal(learner.method.of("vision").past["keys"][0], learner.method.of("vision").key)
    torch.testing.assert_close(scores(learner, images, 64)[:, :2], before)


def test_where_all_tasks_have_the_same_classes_images_count_as_the_current_tasks(lab: Any) -> None:
    bench = lab.but(scenario="domain")
    learner = bench.teach(bench.learner("dualprompt"), bench.stream().tasks[:2])
    assert learner.method.of("vision").owner.tolist() == [1, 1]
