"""L2P: every image chooses for itself, queries are those of the pre-trained encoder, and are computed once a task."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.adapters.prompt_tokens import PromptTokens
from perdure.backbones import BACKBONES
from perdure.core.learner import Core
from perdure.mechanisms.prompting import nearest, query
from perdure.training.config import make_method, make_objective
from perdure.training.loop import fit_task
from perdure.types import Batch, Task

SPEC = "l2p(pool=6, length=2, top=2{})"


def grown(lab: Any, options: str = "") -> tuple[Core, Task, Batch]:
    """A learner whose entries are large and apart, its first task, and some of its images."""
    learner, task = lab.learner(SPEC.format(options)), lab.stream().tasks[0]
    learner.grow(task)
    method, generator = learner.method, torch.Generator().manual_seed(0)
    images = task.train.__getitems__(range(6))
    with torch.no_grad():
        method.of("vision").prompts.normal_(generator=generator)
        # keys amid the queries, which are much alike
        method.of("vision").keys.copy_(lab.backbone()(images)[: len(method.of("vision").keys)])
    return learner, task, images


def queries(lab: Any, images: Batch) -> Tensor:
    return F.normalize(lab.backbone()(images), dim=1)


def choices(lab: Any, learner: Core, images: Batch) -> list[list[int]]:
    """The two entries that each image takes, by a plain loop."""
    keys = F.normalize(learner.method.of("vision").keys.detach(), dim=1)
    ranked = [sorted(range(len(keys)), key=lambda i, q=q: -float(q @ keys[i])) for q in queries(lab, images)]
    return [best[:2] for best in ranked]


# The choice


@pytest.mark.parametrize("reads", ["prompts", "class"])
def test_each_image_is_encoded_with_the_entries_that_it_chose(reads: str, lab: Any) -> None:
    learner, _, images = grown(lab, f", reads={reads!r}")
    features, chosen = learner.encode(images), choices(lab, learner, images)
    assert len({tuple(sorted(best)) for best in chosen}) > 2
    for i, best in enumerate(chosen):
        backbone, tokens = lab.backbone(), PromptTokens(4, 16)
        tokens.reads = reads == "prompts"
        tokens.attach([backbone.get_submodule(name) for name in backbone.blocks()])
        tokens.values.data.copy_(torch.cat([learner.method.of("vision").prompts[entry] for entry in best]))
        alone = backbone({"image": images["image"][i : i + 1]})
        torch.testing.assert_close(features[i], alone[0], rtol=1e-5, atol=1e-5)


def test_the_pool_is_the_same_size_after_any_number_of_tasks(lab: Any) -> None:
    learner = lab.learner(SPEC.format(""))
    sizes = []
    for task in lab.stream():
        lab.teach(learner, [task])
        sizes.append(sum(p.numel() for p in learner.method.parameters()))
    assert sizes == [6 * 16 + 6 * 2 * 16] * 3


def test_entries_that_no_image_chose_learn_nothing(lab: Any) -> None:
    learner, task, _ = grown(lab, ", reads='class'")
    everything = task.train.__getitems__(range(len(task.train)))
    with torch.no_grad():
        learner.method.of("vision").keys[3:] = -queries(lab, everything).mean(0)
    before = {name: p.detach().clone() for name, p in learner.method.named_parameters()}
    fit_task(learner, task, lab.train_config())
    for name, p in learner.method.named_parameters():
        assert torch.equal(p[3:], before[name][3:]), name
        assert (p[:3] - before[name][:3]).abs().max() > 1e-3, name


def test_a_batch_that_votes_tells_the_task_and_an_image_alone_does_not(lab: Any) -> None:
    """The trap: with images of two kinds, an image's entries depend on the company that it keeps."""
    towards = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.1, 0.9, 0.6, 0.0], [0.0, 0.1, 0.8, 0.7]])
    assert nearest(towards, 2).tolist() == [[0, 1], [1, 2], [2, 3]]
    sorted_by_task = nearest(towards[[0, 0, 1]], 2, batchwise=True)
    assert [set(row) for row in sorted_by_task.tolist()] == [{0, 1}] * 3
    other_task = nearest(towards[[2, 2, 1]], 2, batchwise=True)
    assert [set(row) for row in other_task.tolist()] == [{2, 3}] * 3
    assert nearest(towards[[1]], 2, batchwise=True).tolist() == nearest(towards[[1]], 2).tolist()


@pytest.mark.parametrize("batchwise", [False, True])
def test_scores_depend_on_the_company_an_image_keeps_only_where_the_batch_votes(batchwise: bool, lab: Any) -> None:
    learner, _, images = grown(lab, f", batchwise={batchwise}")
    with torch.no_grad():
        together = learner.encode(images)
        one_by_one = torch.cat([learner.encode({"image": image[None]}) for image in images["image"]])
    apart = (together - one_by_one).abs().amax(1)
    assert (apart.max() > 0.01) == batchwise
    assert learner.method.measures(learner) == ({"batchwise": 1.0} if batchwise else {})


# Queries


def test_recorded_queries_equal_recomputed_ones(lab: Any) -> None:
    learner, task, _ = grown(lab)
    data = task.train
    recorded = learner.cache.precomputed(data).__getitems__(range(len(data)))["query"]
    fit_task(learner, task, lab.train_config())  # whatever is learnt meanwhile
    assert torch.equal(recorded, query(learner, data.__getitems__(range(len(data)))))
    for size in (1, 3):
        fresh = torch.cat([query(learner, batch) for batch in learner.batches(data, size)])
        torch.testing.assert_close(recorded, fresh, rtol=1e-5, atol=1e-6)


def test_a_step_and_a_later_evaluation_encode_each_image_once(lab: Any) -> None:
    learner, task, _ = grown(lab)
    encoded: list[int] = []
    learner.backbone.register_forward_hook(lambda _m, args, _y: encoded.append(len(args[0]["image"])))
    images = len(task.train)
    fit_task(learner, task, lab.train_config(epochs=3))
    assert sum(encoded) == images * (1 + 3)  # of which once for the queries
    for passes in (2, 1, 1):
        encoded.clear()
        with learner.inference():
            data = learner.cache.test(task.test)
            for batch in learner.batches(data, 4):
                learner(batch)
        assert sum(encoded) == passes * len(task.test)


# The loss


def test_the_pull_is_the_cosine_to_the_chosen_keys(lab: Any) -> None:
    learner, _, images = grown(lab, ", strength=0.3")
    keys, chosen = F.normalize(learner.method.of("vision").keys.detach(), dim=1), choices(lab, learner, images)
    pairs = zip(queries(lab, images), chosen, strict=True)
    expected = -0.3 * sum(float(q @ keys[entry]) for q, best in pairs for entry in best) / len(chosen)
    assert learner.method.penalty(learner, images, torch.empty(0)).item() == pytest.approx(expected, rel=1e-5)


def test_keys_learn_from_the_pull_only_and_prompts_from_the_cross_entropy_only(lab: Any) -> None:
    learner, _, images = grown(lab)
    method = learner.method
    learner.objective.loss(learner.encode(images), images).backward()
    assert method.of("vision").keys.grad is None
    assert method.of("vision").prompts.grad.any()
    method.of("vision").prompts.grad = None
    method.penalty(learner, images, torch.empty(0)).backward()
    assert method.of("vision").keys.grad.any()
    assert method.of("vision").prompts.grad is None


def test_without_a_pull_keys_stay_where_they_start(lab: Any) -> None:
    learner, task, _ = grown(lab, ", strength=0")
    before = learner.method.of("vision").keys.detach().clone()
    fit_task(learner, task, lab.train_config())
    assert torch.equal(learner.method.of("vision").keys, before)
    assert "method.towers.vision.keys" in learner.learnt_state()


def test_training_draws_keys_to_the_queries(lab: Any) -> None:
    learner, task, images = grown(lab)
    with torch.no_grad():
        learner.method.of("vision").keys.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    before = learner.method.penalty(learner, images, torch.empty(0)).item()
    fit_task(learner, task, lab.train_config())
    assert learner.method.penalty(learner, images, torch.empty(0)).item() < before - 0.01


@pytest.mark.parametrize("batchwise", [False, True])
def test_fisher_of_the_pool_equals_a_loop_over_examples(batchwise: bool, lab: Any) -> None:
    spec = SPEC.format(f", batchwise={batchwise}") + " + ewc(samples=16)"
    learner, task = lab.learner(spec), lab.stream().tasks[0]
    learner.grow(task)
    lab.close(learner, task)
    l2p, ewc = learner.method
    total = torch.zeros_like(l2p.of("vision").prompts)
    for i in range(len(task.train)):
        learner.zero_grad()
        one = task.train.__getitems__([i])
        learner.objective.loss(learner.encode(one), one).backward()
        total += l2p.of("vision").prompts.grad.square()
    found = ewc.fisher["method.parts.0.towers.vision.prompts"]
    assert not ewc.fisher["method.parts.0.towers.vision.keys"].any()
    torch.testing.assert_close(found / found.sum(), total / total.sum(), rtol=1e-3, atol=1e-6)


# What is refused


def test_an_encoder_that_reads_all_tokens_has_no_place_for_the_prompts_mean(saved: Any) -> None:
    task = Task(0, "a", (0, 1), ("x", "y"), 1)

    def grow(kind: str, method: str) -> None:
        backbone = BACKBONES["vision"](path=str(saved[kind]))
        Core(backbone, make_objective("classify"), make_method(method)).grow(task)

    with pytest.raises(ValueError, match=r"which vision\(.*siglip'\) does not read by itself: write reads='class'$"):
        grow("siglip", "l2p")
    grow("siglip", "l2p(reads='class')")
    grow("vit", "l2p")
