"""The learner: derived randomness, modes, what is remembered, what is computed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from perdure.adapters.injection import updates
from perdure.api.learner import Learner
from perdure.core.learner import derived_seed
from perdure.types import Task


def test_randomness_depends_on_seed_task_purpose_and_step_and_nothing_else(lab: Any) -> None:
    def draw(seed: int, task: int, purpose: str, step: int | None) -> float:
        learner = lab.but(seed=seed).learner("probe")
        for each in lab.stream().tasks[: task + 1]:
            learner.grow(each)
        torch.rand(5)
        return float(torch.rand(1, generator=learner.generator(purpose, step)))

    base = (0, 0, "shuffle", 1)
    assert draw(*base) == draw(*base)
    others = [(1, 0, "shuffle", 1), (0, 1, "shuffle", 1), (0, 0, "replay", 1), (0, 0, "shuffle", 2)]
    assert len({draw(*each) for each in [base, *others]}) == 5


def test_derived_seeds_never_change_between_versions() -> None:
    assert derived_seed(0, 0, "shuffle", 1) == 25064542876497773


def test_growing_leaves_the_global_generator_alone_and_does_not_depend_on_it(lab: Any) -> None:
    heads = []
    for seed in (1, 2):
        learner = lab.learner("lora(rank=2)")
        torch.manual_seed(seed)
        expected = torch.random.get_rng_state()
        learner.grow(lab.stream().tasks[0])
        assert torch.equal(torch.random.get_rng_state(), expected)
        heads.append(learner.objective.heads[0].weight)
    assert torch.equal(*heads)


def test_the_backbone_stays_in_evaluation_mode(lab: Any) -> None:
    learner = lab.learner("finetune").train()
    assert learner.training
    assert not any(module.training for module in learner.backbone.modules())


def test_inference_restores_mode_and_weights_even_after_an_error(lab: Any) -> None:
    learner = lab.taught("lora(rank=2)").train()
    weight = learner.backbone.get_submodule("vision.blocks.0.attn.qkv").weight
    before = weight.clone()
    with learner.inference():
        assert not learner.training
        assert not torch.equal(weight, before)
    with pytest.raises(KeyError), learner.inference():
        learner({})
    assert learner.training
    assert torch.equal(weight, before)


def test_memory_holds_what_was_learnt_and_no_frozen_weight(lab: Any) -> None:
    names = {spec: set(lab.taught(spec).learnt_state()) for spec in ("probe", "lora(rank=2)", "finetune")}
    assert names["probe"] == {f"objective.heads.{i}.{n}" for i in range(3) for n in ("weight", "bias")}
    assert not any(name.startswith("backbone.") for name in names["lora(rank=2)"])
    assert {n for n in names["finetune"] if n.startswith("backbone.")} == {
        f"backbone.{n}" for n, _ in lab.backbone().named_parameters()
    }


def test_a_frozen_encoder_sees_each_image_once(lab: Any) -> None:
    learner, seen = lab.learner("probe"), []
    learner.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]["image"])))
    lab.teach(learner, lab.stream(), epochs=5)
    assert sum(seen) == 3 * 16


def test_features_equal_the_backbones_in_order(lab: Any) -> None:
    data = lab.stream().tasks[0].train
    features, labels = lab.learner("probe").features(data, size=3)
    expected = lab.backbone()(data.__getitems__(range(len(data))))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, data.labels)
    assert not features.is_inference()


def test_views_are_at_most_so_many_different_images(lab: Any) -> None:
    learner, data = lab.learner("probe"), lab.stream().tasks[0].train
    images = torch.cat([batch["image"] for batch in learner.training_views(data, 10, "look", size=4)])
    assert len(images) == len(torch.unique(images.flatten(1), dim=0)) == 10
    again = torch.cat([batch["image"] for batch in learner.training_views(data, 10, "look", size=4)])
    assert torch.equal(images, again)


def test_shared_parameters_outlive_their_task(lab: Any) -> None:
    for spec, expected in (("lora(rank=2) + ewc", True), ("inflora(rank=2) + replay", False)):
        learner = lab.learner(spec)
        learner.grow(lab.stream().tasks[0])
        assert any("adapters" in name for name in learner.shared()) == expected
        assert any("heads" in name for name in learner.shared())


def test_a_described_task_is_equal_and_has_no_data(lab: Any) -> None:
    task = lab.stream().tasks[1]
    described = Task.described(task.describe())
    assert described == task
    assert (len(described.train), len(described.test)) == (0, 0)
    with pytest.raises(IndexError, match="this task has no data"):
        described.train.__getitems__([0])


def test_bfloat16_predicts_nearly_the_same_and_detaches_to_the_same_features(lab: Any) -> None:
    exact, rough = lab.learner("lora(rank=2)"), lab.learner("lora(rank=2)")
    rough.precision = torch.bfloat16
    images = lab.stream().tasks[0].test
    for learner in (exact, rough):
        learner.grow(lab.stream().tasks[0])
    a, b = exact.features(images)[0], rough.features(images)[0]
    assert b.dtype == torch.float32
    assert 0 < (a - b).abs().max() < 0.1
    assert all(p.dtype == torch.float32 for p in rough.trainable().values())


@pytest.mark.parametrize("spec", ["lora(rank=2, per_task=True)", "inflora(rank=2)", "o_lora(rank=2)"])
def test_in_bfloat16_the_updates_of_ten_tasks_are_summed_in_float32_and_rounded_once(spec: str, lab: Any) -> None:
    bench = lab.but(tasks=10, per_class=4)
    learner, pretrained = bench.learner(spec), bench.backbone()
    learner.precision = torch.bfloat16
    bench.teach(learner, bench.stream(), epochs=1)
    learner.prepare()
    wholes = {name: layer.weight.clone() for name, layer in pretrained.named_modules() if isinstance(layer, nn.Linear)}
    for site, adapter, part in updates(learner.backbone):
        update = adapter.delta(part, branches=False)
        assert update is not None
        wholes[site.layer][site.rows[0] : site.rows[1]] += update
    for name, whole in wholes.items():
        weight = learner.backbone.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, whole.bfloat16())


def test_in_bfloat16_who_asks_before_the_first_task_changes_nothing_of_what_is_learnt(lab: Any) -> None:
    learners = [lab.learner("lora(rank=2, per_task=True)") for _ in range(2)]
    for learner in learners:
        learner.precision = torch.bfloat16
    with learners[1].inference():
        learners[1].encode(lab.stream().tasks[0].test.__getitems__(range(8)))
    plain, asked = (lab.teach(learner, lab.stream(), epochs=1).learnt_state() for learner in learners)
    assert [name for name in plain if not torch.equal(plain[name], asked[name])] == []


def test_it_shows_itself_in_one_line_and_completes_to_what_is_its_own() -> None:
    images = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8)
    learner = Learner.create("tiny()", "lora(rank=2)", epochs=1).learn(images, ["cat", "dog"] * 4)
    assert repr(learner) == "Learner(tiny(), lora(rank=2); 1 task, 2 classes)"
    assert {"learn", "predict", "predict_proba", "evaluate", "save", "tasks"} <= set(dir(learner)) | {"tasks"}
    assert len([name for name in dir(learner) if not name.startswith("_")]) < 80
    assert "register_full_backward_pre_hook" not in dir(learner)
    assert repr(learner.forget("dog")) == "Learner(tiny(), lora(rank=2); 1 task, 1 class)"


def test_probabilities_are_the_scores_of_predict_column_by_column() -> None:
    images = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8)
    learner = Learner.create("tiny()", "lora(rank=2)", epochs=1).learn(images, ["dog", "cat"] * 4)
    learner.learn(images, ["ant", "bee"] * 4)
    shares = learner.predict_proba(images)
    assert shares.shape == (8, 4)
    expected = [dict(answer) for answer in learner.predict(images)]
    assert [dict(zip(learner.class_names, row, strict=True)) for row in shares.tolist()] == expected
    assert learner.predict_proba([]).shape == (0, 4)
    first = learner.predict_proba(images, task=learner.tasks[0].name)
    assert [dict(zip(learner.tasks[0].names, row, strict=True)) for row in first.tolist()] == [
        dict(answer) for answer in learner.predict(images, task=learner.tasks[0].name)
    ]


def test_it_is_measured_on_what_is_given_or_on_its_own_tests() -> None:
    images = torch.cat([torch.zeros(4, 3, 16, 16), torch.full((4, 3, 16, 16), 255)]).to(torch.uint8)
    labels = ["dark"] * 4 + ["bright"] * 4
    learner = Learner.create("tiny()", "ncm").learn(images, labels)
    assert learner.evaluate(images, labels)["accuracy"] == 1.0
    assert learner.evaluate(images, labels[::-1])["accuracy"] == 0.0
    with pytest.raises(ValueError, match="no test images at hand"):
        learner.evaluate()
    with pytest.raises(ValueError, match="class 'brigth' was not learnt; did you mean 'bright'"):
        learner.evaluate(images, ["brigth"] * 8)


@pytest.mark.parametrize(("backbone", "objective"), [("tiny()", "classify"), ("tiny(text=True)", "zeroshot")])
def test_measured_with_its_task_it_answers_within_that_task_and_then_as_before(backbone: str, objective: str) -> None:
    first, second = (torch.full((8, 3, 16, 16), shade, dtype=torch.uint8) for shade in (40, 41))
    first[:4], second[:4] = 0, 1  # as the other task's, nearly
    learner = Learner.create(backbone, "pnn(rank=2)", objective=objective)
    learner.learn(first, ["dark"] * 4 + ["bright"] * 4, epochs=4)
    learner.learn(second, ["black"] * 4 + ["white"] * 4, epochs=4)
    one, two = (task.name for task in learner.tasks)
    for images, names, task in ((first, ("dark", "bright"), one), (second, ("black", "white"), two)):
        labels = [names[0]] * 4 + [names[1]] * 4
        before = learner.evaluate(images, labels)
        right = [line[0][0] == name for line, name in zip(learner.predict(images, task=task), labels, strict=True)]
        assert learner.evaluate(images, labels, task=task)["accuracy"] == sum(right) / 8
        assert learner.evaluate(images, labels) == before
    assert learner.scenario == "class"
    for wrong, message in (("three", "has no task 'three'"), (one, "'black' is none of task")):
        with pytest.raises(ValueError, match=message):
            learner.evaluate(second, ["black"] * 8, task=wrong)
    assert learner.scenario == "class"


def test_images_of_a_folder_that_were_taught_are_no_test(tmp_path: Path) -> None:
    for number in range(24):
        place = tmp_path / "pets" / ("cat" if number % 2 else "dog") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(place)
    learner = Learner.create("tiny()", "ncm").learn(tmp_path / "pets")
    own, taught = learner.evaluate(), len(learner.tasks[0].train)
    assert 0 < taught < 24
    learner.save(tmp_path / "kept")
    for each in (learner, Learner.load(tmp_path / "kept")):
        with pytest.warns(UserWarning, match=f"{taught} images were taught to this learner and are left out"):
            assert each.evaluate(tmp_path / "pets") == own
    train = learner.tasks[0].train
    seen = {train.source.paths[row] for row in train.rows.tolist()}
    for place in (tmp_path / "pets").rglob("*.png"):
        if str(place.relative_to(tmp_path / "pets")) not in seen:
            place.unlink()
    with pytest.raises(ValueError, match=f"all {taught} images were taught to this learner: measure on others"):
        learner.evaluate(tmp_path / "pets")
    with pytest.raises(ValueError, match="has no effect without images: leave it out"):
        learner.evaluate(labels=["cat"])


def test_what_says_nothing_of_a_learner_is_refused_when_it_is_made() -> None:
    for name, value in (("online", True), ("stream", "synthetic()"), ("retain", ())):
        with pytest.raises(ValueError, match=rf"create\({name}=.* has no effect: leave it out"):
            Learner.create("tiny()", "probe", **{name: value})
    with pytest.raises(ValueError, match=r"nothing to protect in 'lora\(rank=2, per_task=True\) \+ ewc'"):
        Learner.create("tiny()", "lora(rank=2, per_task=True) + ewc")


@pytest.mark.parametrize("progress", [3, [], print, "loud"])
def test_who_cannot_be_told_is_refused_before_a_lesson(progress: Any) -> None:
    learner, images = Learner.create("tiny()", "ncm"), torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"progress=.* has no task\(\.\.\.\): expected an object such as Screen\(\)"):
        learner.learn(images, ["cat", "dog"] * 2, progress)
    assert learner.learnt == 0


def test_a_language_model_is_not_pre_trained() -> None:
    learner = Learner.create("tiny_mllm()", "lora(rank=2, tower='vision')", epochs=1)
    images = torch.randint(0, 255, (8, 3, 28, 28), dtype=torch.uint8)
    for pretext in ("masked()", "distill()"):
        with pytest.raises(ValueError, match=r"is a language model: teach it captions or questions with"):
            learner.pretrain(images, pretext)
    assert learner.learnt == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backbone": 3}, "backbone=3: expected str"),
        ({"method": 3}, "method=3: expected str"),
        ({"objective": 3}, "objective=3: expected str"),
        ({"backbone": Path("tiny()")}, r"Path\('tiny\(\)'\), expected a text"),
        ({"method": Path("lora")}, r"Path\('lora'\), expected a text"),
    ],
)
def test_what_is_no_text_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Learner.create(**{"backbone": "tiny()", **given})
    with pytest.raises(ValueError, match="pretext=3: expected str"):
        Learner.create("tiny()", "lora(rank=2)").pretrain(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), 3)


def test_a_folder_among_the_images_is_told_how_to_be_given(tmp_path: Path) -> None:
    learner = Learner.create("tiny()", "ncm").learn(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), ["cat", "dog"] * 2)
    for images in (tmp_path, str(tmp_path), [tmp_path]):
        with pytest.raises(ValueError, match=r"is a folder: give its images, as list\(Path\('"):
            learner.predict(images)
