"""Objectives: which classes compete, what the text tower is asked, which column is which class."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.backbones.clip import pocket
from perdure.objectives import Classify
from perdure.training.config import make_objective
from perdure.training.loop import fit_task
from perdure.types import Batch, Task


def task(index: int, classes: tuple[int, ...]) -> Task:
    return Task(index, f"t{index}", classes, tuple(f"name {c}" for c in classes))


def grown(lab: Any, *tasks: tuple[int, ...], method: str = "probe") -> Any:
    learner = lab.learner(method)
    for index, classes in enumerate(tasks):
        learner.grow(task(index, classes))
    return learner


def test_local_cross_entropy_equals_other_classes_masked_to_minus_infinity(lab: Any) -> None:
    learner = grown(lab, (0, 1), (2, 3), (4, 5))
    features, labels = torch.randn(6, 16), torch.tensor([4, 5, 5, 4, 4, 5])
    scores = learner.objective.scores(features)
    masked = scores.clone()
    masked[:, :4] = -math.inf
    expected = F.cross_entropy(masked, labels)
    torch.testing.assert_close(learner.objective.loss(features, {"label": labels}), expected)
    expected.backward()
    assert not learner.objective.heads[0].weight.requires_grad
    assert learner.objective.heads[2].weight.grad.abs().sum() > 0


def test_with_an_old_example_in_the_batch_all_seen_classes_compete(lab: Any) -> None:
    learner = grown(lab, (0, 1), (2, 3))
    features, labels = torch.randn(3, 16), torch.tensor([2, 3, 0])
    expected = F.cross_entropy(learner.objective.scores(features), labels)
    torch.testing.assert_close(learner.objective.loss(features, {"label": labels}), expected)
    told = learner.objective.losses(features[:2], {"label": labels[:2]}, only_task=False).mean()
    torch.testing.assert_close(told, F.cross_entropy(learner.objective.scores(features[:2]), labels[:2]))


class Tokens(Classify):
    """An objective whose examples have several rows each."""

    def targets(self, batch: Batch) -> Tensor:
        return batch["token"]

    def owners(self, batch: Batch) -> Tensor:
        return batch["owner"]


def test_the_loss_of_an_example_is_the_mean_over_its_rows(lab: Any) -> None:
    learner = lab.learner("probe")
    learner.objective = Tokens()
    learner.grow(task(0, (0, 1, 2)))
    rows, owners, tokens = torch.randn(5, 16), torch.tensor([0, 1, 1, 0, 1]), torch.tensor([2, 0, 1, 1, 2])
    losses = learner.objective.losses(rows, {"label": torch.tensor([0, 1]), "owner": owners, "token": tokens})
    each = F.cross_entropy(learner.objective.scores(rows), tokens, reduction="none")
    torch.testing.assert_close(losses, torch.stack([each[[0, 3]].mean(), each[[1, 2, 4]].mean()]))


def test_old_answers_are_apart_only_where_the_task_is_told(lab: Any) -> None:
    for scenario, groups in (("class", [[0, 1, 2, 3]]), ("task", [[0, 1], [2, 3]])):
        learner = grown(lab.but(scenario=scenario), (0, 1), (2, 3), (4, 5))
        features = torch.randn(3, 16)
        scores = learner.objective.scores(features)
        old = learner.objective.distributions(features, {}, old=True)
        assert all(torch.equal(found, scores[:, own]) for found, own in zip(old, groups, strict=True))
        assert torch.equal(learner.objective.distributions(features, {})[0], scores)


def test_columns_follow_the_order_of_arrival_not_the_class_ids(lab: Any) -> None:
    learner = grown(lab, (7, 2), (0, 5, 2))
    assert learner.objective.classes == (7, 2, 0, 5)
    assert learner.objective.names == ("name 7", "name 2", "name 0", "name 5")
    assert learner.objective.columns(torch.tensor([0, 2, 5, 7])).tolist() == [2, 1, 3, 0]
    assert learner.objective.task_columns == (1, 2, 3)
    features, labels = torch.randn(4, 16), torch.tensor([5, 2, 0, 2])
    expected = F.cross_entropy(learner.objective.scores(features)[:, 1:], torch.tensor([2, 0, 1, 0]))
    torch.testing.assert_close(learner.objective.loss(features, {"label": labels}), expected)


def test_permuted_class_ids_learn_the_same_function(lab: Any) -> None:
    """Ids are names: only their order of arrival matters."""
    one, other = lab.learner("lora(rank=2)"), lab.learner("lora(rank=2)")
    renamed = {c: (5 * c + 3) % 101 for c in range(6)}

    class Renamed:
        def __init__(self, data: Any) -> None:
            self.data, self.labels = data, torch.tensor([renamed[c] for c in data.labels.tolist()])

        def __len__(self) -> int:
            return len(self.data)

        def __getitems__(self, positions: Any) -> Any:
            return self.data.__getitems__(positions) | {"label": self.labels[torch.as_tensor(positions)]}

    for each in lab.stream():
        lab.teach(one, [each])
        classes = tuple(renamed[c] for c in each.classes)
        lab.teach(other, [Task(each.index, each.name, classes, each.names, each.total, Renamed(each.train))])
    a, b = one.learnt_state(), other.learnt_state()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_a_domain_stream_keeps_one_head_and_goes_on_training_it(lab: Any) -> None:
    bench = lab.but(scenario="domain")
    learner = bench.learner("lora(rank=2)")
    for each in bench.stream():
        bench.teach(learner, [each])
        assert len(learner.objective.heads) == 1
        assert learner.objective.heads[0].weight.requires_grad
        assert learner.objective.classes == (0, 1)


def test_only_the_heads_of_the_current_classes_are_trained(lab: Any) -> None:
    learner = grown(lab, (0, 1), (2,), (1, 3))
    assert [head.weight.requires_grad for head in learner.objective.heads] == [True, False, True]
    assert [len(head.weight) for head in learner.objective.heads] == [2, 1, 1]


def test_zeroshot_scores_equal_the_computation_by_hand(lab: Any) -> None:
    templates = ("a photo of a {}.", "{}, drawn")
    bench = lab.but(objective=f"zeroshot(templates={templates!r})")
    learner = grown(bench, (0, 1), (2,))
    features, backbone = torch.randn(4, 16), learner.backbone
    embeddings = []
    for name in ("name 0", "name 1", "name 2"):
        each = [F.normalize(backbone.encode_text([t.format(name)])[0], dim=0) for t in templates]
        embeddings.append(F.normalize((each[0] + each[1]) / 2, dim=0))
    expected = 10 * F.normalize(features, dim=1) @ torch.stack(embeddings).T  # tiny's logit scale is 10
    torch.testing.assert_close(learner.objective.scores(features), expected, rtol=1e-5, atol=1e-5)


def calls(learner: Any) -> list[int]:
    """Number of texts in each call of the text tower."""
    seen: list[int] = []
    learner.backbone.text.register_forward_hook(lambda _m, args, _y: seen.append(len(args[0])))
    return seen


def test_a_constant_text_tower_is_asked_once_a_task(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, stream = bench.learner("lora(rank=2)"), bench.stream()
    seen = calls(learner)
    for each in stream:
        bench.teach(learner, [each])
        learner.features(each.test)
        with learner.inference():
            learner({"features": torch.randn(2, 16)})
    assert seen == [2, 4, 6]


def test_an_adapted_text_tower_is_asked_in_every_step_and_gets_the_gradient(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, first = bench.learner("lora(rank=2, tower='text')"), bench.stream().tasks[0]
    learner.grow(first)
    seen = calls(learner)
    before = learner.objective.embed(["picture 0"]).detach().clone()
    fit_task(learner, first, bench.train_config())
    assert len(seen) == 1 + 4
    assert all(p.grad is not None and p.grad.any() for p in learner.trainable().values())
    assert (learner.objective.embed(["picture 0"]) - before).abs().max() > 1e-3
    with learner.inference():
        for _ in range(3):
            learner({"features": torch.randn(2, 16)})
    assert len(seen) == 1 + 4 + 1 + 1  # once for all predictions


def test_adapting_the_text_tower_for_classify_is_refused(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner = bench.learner("lora(rank=2, tower='text')")
    learner.objective = make_objective("classify")
    learner.grow(bench.stream().tasks[0])
    with pytest.raises(ValueError, match=r"get no gradient.*classify uses the vision tower only"):
        fit_task(learner, bench.stream().tasks[0], bench.train_config())


def test_zeroshot_without_a_text_tower_says_which_backbones_have_one(lab: Any) -> None:
    learner = lab.learner("lora(rank=2)")
    learner.objective = make_objective("zeroshot")
    with pytest.raises(ValueError, match=r"zeroshot needs a text tower, which tiny.* lacks: use clip"):
        learner.grow(lab.stream().tasks[0])


def test_a_template_without_a_place_for_the_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"template 'a photo' has no \{\} for the class name"):
        make_objective("zeroshot(templates='a photo')")


def test_zeroshot_measures_tasks_before_they_are_learnt(lab: Any, tmp_path: Any) -> None:
    summary = lab.but(objective="zeroshot").run("lora(rank=2)", tmp_path)
    assert summary["fwt"] is not None
    assert [len([v for v in row if v is not None]) for row in summary["matrix"]] == [2, 3, 3]


def test_the_logit_scale_is_never_trained(lab: Any) -> None:
    learner = lab.but(objective="zeroshot").taught("finetune(tower='both')")
    assert learner.backbone.logit_scale.item() == pytest.approx(10)
    assert not any("scale" in name for name in learner.trainable())
    assert isinstance(learner.backbone.text, nn.Module)


def test_the_logit_scale_is_not_rounded_with_the_weights() -> None:
    backbone = pocket()
    published = backbone.model.logit_scale.exp().item()
    backbone.to(torch.bfloat16)
    assert backbone.logit_scale.item() == pytest.approx(published, rel=1e-6)
    assert backbone.model.logit_scale.float().exp().item() != pytest.approx(published, rel=1e-4)
