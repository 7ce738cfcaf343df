"""Methods against hand calculations: nearest means, replay, joint, fine-tuning with and without the mask."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.methods.joint import Union


def test_ncm_answers_by_the_cosine_to_class_means(lab: Any) -> None:
    learner, stream, backbone = lab.taught("ncm"), lab.stream(), lab.backbone()
    means = []
    for task in stream:
        images = task.train.__getitems__(range(len(task.train)))
        features = backbone(images)
        means += [features[images["label"] == c].mean(0) for c in task.classes]
    test = stream.tasks[1].test.__getitems__(range(8))
    expected = F.normalize(backbone(test), dim=1) @ F.normalize(torch.stack(means), dim=1).T
    with learner.inference():
        torch.testing.assert_close(learner(test), expected, rtol=1e-5, atol=1e-5)
    assert learner.trainable() == {}


def test_ncm_means_of_a_class_that_comes_again_are_over_all_its_images(lab: Any) -> None:
    bench = lab.but(scenario="domain")
    learner, stream, backbone = bench.taught("ncm"), bench.stream(), bench.backbone()
    images = [task.train.__getitems__(range(len(task.train))) for task in stream]
    features = torch.cat([backbone(each)[each["label"] == 1] for each in images])
    assert learner.method.counts["1"].item() == len(features)
    torch.testing.assert_close(learner.method.sums["1"] / len(features), features.mean(0), rtol=1e-5, atol=1e-5)


def test_ncm_beside_a_trained_encoder_takes_the_means_of_that_moment(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + ncm"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    features, labels = learner.features(stream.tasks[0].train)
    torch.testing.assert_close(learner.method.parts[1].sums["0"], features[labels == 0].sum(0))
    before = learner.method.parts[1].sums["0"].clone()
    lab.teach(learner, stream.tasks[1:])
    assert torch.equal(learner.method.parts[1].sums["0"], before)


def test_ncm_beside_joint_counts_every_image_once(lab: Any) -> None:
    learner = lab.taught("lora(rank=2) + joint + ncm")
    assert {int(count) for count in learner.method.parts[2].counts.values()} == {lab.per_class}


def test_replay_appends_old_examples_in_the_given_ratio(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + replay(size=6, ratio=0.5)"), lab.stream()
    lab.teach(learner, stream.tasks[:2])
    learner.grow(stream.tasks[2])
    new = stream.tasks[2].train.__getitems__(range(8))
    batch = learner.method.batch(learner, new)
    assert torch.equal(batch["image"][:8], new["image"])
    assert len(batch["label"]) == 12
    assert set(batch["label"][8:].tolist()) <= {0, 1, 2, 3}
    refs = learner.method.parts[1].memory.refs
    kept = torch.stack([stream.tasks[t].train.__getitems__([p])["image"][0] for t, p, _ in refs.tolist()])
    assert all((kept == image).flatten(1).all(1).any() for image in batch["image"][8:])
    assert all(head.weight.requires_grad for head in learner.objective.heads)


def test_replay_in_the_first_task_changes_nothing(lab: Any) -> None:
    plain, replay = lab.learner("lora(rank=2)"), lab.learner("lora(rank=2) + replay")
    a, b = (lab.teach(learner, lab.stream().tasks[:1]) for learner in (plain, replay))
    assert all(torch.equal(p, q) for p, q in zip(a.trainable().values(), b.trainable().values(), strict=True))


def test_replay_says_how_many_bytes_it_refers_to(lab: Any) -> None:
    learner = lab.taught("lora(rank=2) + replay(size=5)")
    assert learner.method.measures(learner) == {"referenced_bytes": 5 * 3 * 16 * 16}


def test_bytes_of_two_memories_add_up(lab: Any) -> None:
    learner = lab.teach(lab.learner("probe + replay(size=5) + agem(size=7)"), lab.stream().tasks[:1])
    assert learner.method.measures(learner)["referenced_bytes"] == 12 * 3 * 16 * 16


def test_replay_keeps_old_classes_alive(lab: Any) -> None:
    """After the last task an old image is scored among all classes: without old examples the newest heads win."""
    bench = lab.but(per_class=16, epochs=6, noise=0.3)
    data = [task.test for task in bench.stream().tasks[:2]]

    def right(method: str) -> float:
        learner = bench.taught(method)
        with learner.inference():
            answers = torch.cat([learner.scores_of(each).argmax(1) for each in data])
        return float((answers == torch.cat([each.labels for each in data])).float().mean())

    assert right("lora(rank=2) + replay(size=30, selection='class_balanced')") > right("lora(rank=2)") + 0.1


def test_joint_trains_on_all_images_so_far(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2) + joint"), lab.stream()
    for task in stream:
        learner.grow(task)
        data = learner.method.data(learner, task)
        assert data.labels.tolist() == [c for t in stream.tasks[: task.index + 1] for c in t.train.labels.tolist()]


def test_a_union_gives_its_examples_in_the_order_asked_for(lab: Any) -> None:
    sets = [task.train for task in lab.stream()]
    whole = torch.cat([each.__getitems__(range(len(each)))["image"] for each in sets])
    union = Union(sets)
    order = [0, 0, 47, 16, 15, *torch.randperm(len(union), generator=torch.Generator().manual_seed(0))[:20].tolist()]
    batch = union.__getitems__(order)
    assert torch.equal(batch["image"], whole[order])
    assert torch.equal(batch["label"], union.labels[order])
    assert len(union) == len(whole) == 48


def test_joint_alone_learns_what_sequential_fine_tuning_forgets(lab: Any, tmp_path: Any) -> None:
    bench = lab.but(per_class=16, epochs=6, noise=0.3)
    joint, sequential = (bench.run(m, tmp_path / m[:5]) for m in ("joint", "finetune(mask=False)"))
    assert joint["acc"] > sequential["acc"] + 0.2


@pytest.mark.parametrize(("mask", "collapses"), [(False, True), (True, False)])
def test_without_the_mask_the_head_collapses_onto_the_last_task(mask: bool, collapses: bool, lab: Any) -> None:
    bench = lab.but(per_class=16, epochs=6)
    learner, stream = bench.taught(f"finetune(mask={mask})"), bench.stream()
    with learner.inference():
        answers = torch.cat([learner.scores_of(task.test).argmax(1) for task in stream.tasks[:2]])
    share_of_last = float((answers >= 4).float().mean())
    assert (share_of_last > 0.95) == collapses


def test_finetune_trains_the_encoder_more_gently_than_the_head(lab: Any) -> None:
    learner = lab.learner("finetune(backbone_lr=0.01)")
    learner.grow(lab.stream().tasks[0])
    groups = learner.method.param_groups(learner)
    assert set(groups.values()) == {0.01}
    assert set(groups) == {f"backbone.{name}" for name, _ in learner.backbone.named_parameters()}


def test_fine_tuning_one_tower_leaves_the_other_alone(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, before = bench.taught("finetune(tower='text')"), bench.backbone().state_dict()
    changed = {k.split(".")[0] for k, v in learner.backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"text"}


def test_lora_goes_on_with_the_same_branches(lab: Any) -> None:
    learner, stream = lab.learner("lora(rank=2, alpha=6)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    before = [p.detach().clone() for p in learner.method.parameters()]
    learner.grow(stream.tasks[1])
    assert all(torch.equal(p, q) for p, q in zip(learner.method.parameters(), before, strict=True))
    assert {adapter.scale for adapter in learner.method.adapters} == {3.0}


def test_probe_trains_heads_only(lab: Any) -> None:
    learner = lab.taught("probe")
    assert set(learner.trainable()) == {"objective.heads.2.weight", "objective.heads.2.bias"}
    assert learner.constant_encoder
