"""Pre-training without labels: what its objectives count, that it teaches, and that it leaves heads alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.api.learner import Learner
from perdure.api.merge import merge
from perdure.backbones.tiny import tiny
from perdure.metrics import taught_only
from perdure.pretraining.distill import Distill
from perdure.pretraining.masked import Masked, normalised
from perdure.pretraining.patches import grid_of, hidden_patches, patches_of, tokens_of, without
from perdure.training.loop import Quiet
from perdure.types import Task

SIDE, PATCH = 16, 4
METHODS = (
    "lora(rank=2)",
    "lora(rank=2, per_task=True)",
    "finetune(backbone_lr=1.0)",
    "adapter(rank=2)",
    "inflora(rank=2)",
    "lora(rank=2) + feature_distill",
    "lora(rank=2) + replay(size=8)",
    "finetune(backbone_lr=1.0) + weight_average",
)


class Losses(Quiet):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, step: int, loss: Tensor, images: int) -> None:
        self.seen.append(float(loss))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """24 smooth pictures, whose hidden patches can be guessed from the others."""
    coarse = torch.rand(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, SIDE, mode="bilinear")
    return (255 * smooth).to(torch.uint8)


def made(method: str, backbone: str = "tiny(dim=16)", **options: Any) -> Learner:
    return Learner.create(backbone, method, **{"precision": "fp32", "batch_size": 12, "epochs": 2} | options)


def grown(method: str, pretext: str = "masked()") -> Learner:
    learner = made(method)
    learner.grow(Task(0, "pre-training", (), (), pretext=pretext))
    return learner


def test_as_many_patches_of_each_image_are_hidden_as_asked_for_and_others_in_each_step() -> None:
    learner = grown("lora(rank=2)")
    hidden = hidden_patches(learner, 6, 4, 0.6)
    assert hidden.sum(1).tolist() == [10] * 6
    assert torch.equal(hidden, hidden_patches(learner, 6, 4, 0.6))
    learner.step = 1
    assert not torch.equal(hidden, hidden_patches(learner, 6, 4, 0.6))
    assert hidden_patches(learner, 6, 4, 0.01).sum(1).tolist() == [1] * 6
    assert hidden_patches(learner, 6, 4, 0.99).sum(1).tolist() == [15] * 6  # of all, nothing could be predicted


def test_patches_are_pixels_of_their_place() -> None:
    image = torch.arange(3 * SIDE * SIDE).view(1, 3, SIDE, SIDE)
    patches = patches_of(image, SIDE // PATCH)
    assert patches.shape == (1, 16, 3 * PATCH * PATCH)
    assert torch.equal(patches[0, 6].view(3, PATCH, PATCH), image[0, :, 4:8, 8:12].float())


def test_what_is_hidden_has_no_influence_on_what_is_predicted(pictures: Tensor) -> None:
    learner = grown("lora(rank=2)")
    hidden = hidden_patches(learner, 2, 4, 0.5)
    pair = pictures[:2].clone()
    row, column = divmod(int(hidden[0].nonzero()[0]), 4)
    other = pair.clone()
    other[0, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 40
    shown = [without(learner.backbone, image, hidden) for image in (pair, other)]
    assert not torch.equal(pair, other)
    assert torch.equal(*shown)
    visible = patches_of(shown[0], 4)[~hidden]
    assert torch.equal(visible, patches_of(pair, 4)[~hidden])


def test_only_hidden_patches_count(pictures: Tensor) -> None:
    learner = grown("lora(rank=2)", "masked(ratio=0.5)")
    pretext = learner.pretext
    assert isinstance(pretext, Masked)
    image = pictures[:4]
    hidden = hidden_patches(learner, 4, 4, 0.5)
    truth = normalised(patches_of(image, 4)[hidden])
    asked = []

    class Knowing(torch.nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            asked.append(tokens)
            return truth

    pretext.decoder = Knowing()  # type: ignore[assignment]
    assert float(pretext.loss(learner, {"image": image, "label": torch.full((4,), -1)})) == 0
    tokens = tokens_of(learner, {"image": without(learner.backbone, image, hidden)}, 4)
    assert torch.equal(asked[0], tokens[hidden])
    truth += 1
    assert float(pretext.loss(learner, {"image": image, "label": torch.full((4,), -1)})) == 1


def test_a_patch_of_one_colour_is_predicted_as_nothing() -> None:
    assert torch.equal(normalised(torch.full((2, 12), 7.0)), torch.zeros(2, 12))
    rows = normalised(torch.rand(5, 48, generator=torch.Generator().manual_seed(1)))
    assert rows.mean(1) == pytest.approx(torch.zeros(5), abs=1e-5)
    assert rows.std(1, correction=0) == pytest.approx(torch.ones(5), abs=1e-3)


@pytest.mark.parametrize("teacher", ["", "teacher='tiny(dim=8, size=24, seed=3)', ratio=0.25"])
def test_distillation_compares_whitened_features_of_hidden_images_with_the_teachers_of_whole_ones(
    teacher: str, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = grown("lora(rank=2)", f"distill({teacher})")
    pretext, image = learner.pretext, pictures[:6]
    assert isinstance(pretext, Distill)
    with torch.no_grad():
        whole = learner.backbone({"image": image})  # fresh LoRA changes nothing
        hidden = hidden_patches(learner, 6, 4, 0.25 if teacher else 0.5)
        given = learner.backbone({"image": without(learner.backbone, image, hidden)})
        if teacher:
            other = tiny(dim=8, size=24, seed=3)
            large = torch.nn.functional.interpolate(image.float(), (24, 24), mode="bicubic", antialias=True)
            whole = other({"image": large.round().clamp(0, 255).to(torch.uint8)})
            pretext.projection.weight.mul_(20)
            given = pretext.projection(given)
        else:
            given = whitened(given)
        apart = given - whitened(whole)
        by_hand = torch.where(apart.abs() < 2, apart.square() / 4, apart.abs() - 1).mean()
        assert bool((apart.abs() > 2).any()) == bool(teacher)
        pretext.begin_task(learner)
        ask, other_asked = pretext.said.ask, pretext._other  # features of tiny have about mean 0 and variance 1
        monkeypatch.setattr(pretext, "_other", lambda image: 3 * other_asked(image) + 1)
        monkeypatch.setattr(pretext.said, "ask", lambda *of: {name: 3 * x + 1 for name, x in ask(*of).items()})
        loss = pretext.loss(learner, {"image": image, "label": torch.full((6,), -1)})
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-6)


def whitened(x: Tensor) -> Tensor:
    """Rows of mean 0 and variance 1."""
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()


def test_the_grid_is_that_of_the_model() -> None:
    assert grid_of(tiny(size=24)) == 6
    assert grid_of(tiny(size=8)) == 2
    with pytest.raises(ValueError, match="which are no square of patches"):
        grid_of(tiny(size=4))


@pytest.mark.parametrize(
    ("method", "pretext"),
    [
        *((method, "masked()") for method in METHODS),
        ("lora(rank=2)", "distill()"),
        ("inflora(rank=2)", "distill(teacher='tiny(dim=8, size=24, seed=3)')"),
    ],
)
def test_the_loss_falls_and_the_encoder_moves(method: str, pretext: str, pictures: Tensor) -> None:
    learner, losses = made(method), Losses()
    before = learner.features(learner_data(learner, pictures))[0]
    learner.pretrain(pictures, pretext, progress=losses, epochs=20, lr=1e-2)
    assert sum(losses.seen[-4:]) < 0.9 * sum(losses.seen[:4])
    assert not torch.equal(learner.features(learner_data(learner, pictures))[0], before)
    assert learner.learnt == 1
    assert learner.pretext is None
    assert not [key for key in learner.state_dict() if key.startswith("pretext")]


def learner_data(learner: Learner, pictures: Tensor) -> Any:
    from perdure.streams import ImageSet

    return ImageSet.of(pictures, [0] * len(pictures), learner.backbone.preprocess)


@pytest.mark.parametrize("method", [m for m in METHODS if "finetune" not in m])
def test_before_the_first_step_features_are_the_backbones(method: str, pictures: Tensor) -> None:
    learner = grown(method)
    plain = tiny(dim=16)
    with torch.no_grad():
        assert torch.equal(learner.encode({"image": pictures}), plain({"image": pictures}))


@pytest.mark.parametrize("method", METHODS)
def test_heads_and_memories_stay_and_lessons_go_on(method: str, pictures: Tensor) -> None:
    learner = made(method).pretrain(pictures, epochs=2).learn(pictures, ["a", "b"] * 12)
    heads = {key: value.clone() for key, value in learner.objective.state_dict().items()}
    kept = {key: value.clone() for key, value in learner.method.state_dict().items() if "refs" in key}
    features = learner.features(learner_data(learner, pictures))[0]
    learner.pretrain(pictures.flip(0), "distill()", epochs=3)
    assert heads.keys() == learner.objective.state_dict().keys()
    assert all(torch.equal(value, learner.objective.state_dict()[key]) for key, value in heads.items())
    assert all(torch.equal(value, learner.method.state_dict()[key]) for key, value in kept.items())
    assert not torch.equal(learner.features(learner_data(learner, pictures))[0], features)
    learner.learn(pictures, ["c", "d"] * 12)
    assert learner.class_names == ("a", "b", "c", "d")
    assert [len(line) for line in learner.predict(pictures[:2])] == [4, 4]


@pytest.mark.parametrize("part", ["ncm", "ranpac(dim=16)", "align"])
def test_statistics_are_of_features_after_pre_training_or_it_is_refused(part: str, pictures: Tensor) -> None:
    learner = made(f"lora(rank=2, tasks=1) + {part}").pretrain(pictures, lr=1e-2)
    moved = learner.features(learner_data(learner, pictures))[0]
    learner.learn(pictures, ["a", "b"] * 12)
    assert torch.equal(learner.features(learner_data(learner, pictures))[0], moved)
    again = made(part).learn(pictures, ["a", "b"] * 12)
    with pytest.raises(ValueError, match=r"trains nothing that makes features|keeps statistics"):
        again.pretrain(pictures)
    stale = made(f"lora(rank=2) + {part}").learn(pictures, ["a", "b"] * 12)
    with pytest.raises(ValueError, match=rf"{part[:3]}.* keeps statistics of the features .* make stale"):
        stale.pretrain(pictures)
    assert stale.learnt == 1


def test_pairs_of_images_and_captions_teach_both_ways(pictures: Tensor) -> None:
    texts = [f"picture number {i}" for i in range(24)]
    learner, losses = made("lora(rank=4, at='qkvo,mlp')", "tiny(dim=16, text=True)"), Losses()
    learner.pretrain(pictures, "contrast()", captions=texts, progress=losses, epochs=30, lr=1e-2)
    assert sum(losses.seen[-4:]) < 0.9 * sum(losses.seen[:4])
    learner.learn(pictures, ["a", "b"] * 12).pretrain(pictures, "contrast()", captions=texts)
    assert learner.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("method", "pretext", "message"),
    [
        ("ewc + lora", "masked()", "ewc takes no part in a step without labels: pre-train with parts that do"),
        ("probe", "masked()", "probe takes no part"),
        ("inflora(ranks=(2, 4))", "masked()", "inflora with these options takes no part"),
        ("lora", "masked(ratio=1)", "ratio=1.*expected less than 1"),
        ("lora", "distill(ratio=0)", "ratio=0.*leave nothing to learn"),
        ("lora", "mask()", "mask"),
        ("lora", "contrast()", "captions are missing"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(method: str, pretext: str, message: str, pictures: Tensor) -> None:
    learner = made(method)
    with pytest.raises(ValueError, match=message) as refusal:
        learner.pretrain(pictures, pretext)
    assert "\n" not in str(refusal.value)
    assert learner.learnt == 0
    assert learner.pretext is None


def test_captions_are_refused_where_they_cannot_be_read(pictures: Tensor) -> None:
    texts = ["x"] * 24
    with pytest.raises(ValueError, match="captions have no effect with masked"):
        made("lora").pretrain(pictures, captions=texts)
    with pytest.raises(ValueError, match="contrast needs a text tower"):
        made("lora").pretrain(pictures, "contrast()", captions=texts)
    with pytest.raises(ValueError, match="replay remembers images of classes, which have no captions"):
        made("lora + replay", "tiny(text=True)").pretrain(pictures, "contrast()", captions=texts)
    with pytest.raises(ValueError, match="this learner learns captions by this very loss"):
        made("lora", "tiny(text=True)", objective="retrieve()").pretrain(pictures, "contrast()", captions=texts)
    with pytest.raises(ValueError, match="masked is learnt in one process and whole batches"):
        made("lora", accumulate=2).pretrain(pictures)
    with pytest.raises(ValueError, match="this learner was only pre-trained, without labels: teach it first"):
        made("lora").pretrain(pictures).predict(pictures)


def test_a_step_without_labels_is_no_task_to_answer_within(pictures: Tensor) -> None:
    learner = made("lora").pretrain(pictures).learn(pictures, ["a", "b"] * 12)
    step = learner.tasks[0].name
    for asked in (learner.predict, learner.predict_proba):
        with pytest.raises(ValueError, match=f"^task '{step}' is a step of pre-training, which taught nothing to be"):
            asked(pictures, task=step)
    with pytest.raises(ValueError, match=f"no task 'moths'; it has learnt: '{learner.tasks[1].name}'$"):
        learner.predict(pictures, task="moths")


def test_steps_without_labels_stay_such_in_who_is_merged(pictures: Tensor, tmp_path: Any) -> None:
    one = made("lora(rank=2)").pretrain(pictures).learn(pictures, ["a", "b"] * 12)
    two = made("lora(rank=2)").learn(pictures, ["c", "d"] * 12)
    both = merge({"one": one, "two": two}, "average()", weights=(1, 0))
    assert [task.pretext for task in both.tasks] == ["masked()", "", ""]
    assert both.pretext is None
    both.save(tmp_path / "both")
    again = Learner.load(tmp_path / "both")
    assert [task.pretext for task in again.tasks] == ["masked()", "", ""]
    found = again.predict_proba(pictures, task=again.tasks[1].name)
    torch.testing.assert_close(found, one.predict_proba(pictures), atol=1e-5, rtol=1e-4)
    again.learn(pictures, ["e", "f"] * 12)


def test_nothing_is_trained_where_the_encoder_stays(pictures: Tensor) -> None:
    learner = made("lora(tasks=1)").learn(pictures, ["a", "b"] * 12)
    with pytest.raises(ValueError, match="trains nothing that makes features"):
        learner.pretrain(pictures)


def test_a_finished_step_needs_no_teacher_to_be_loaded(
    pictures: Tensor, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = (
        made("lora(rank=2)").pretrain(pictures, "distill(teacher='tiny(seed=3)')").learn(pictures, ["a", "b"] * 12)
    )
    learner.save(tmp_path / "x")

    def gone(text: str) -> None:
        raise AssertionError(text)

    monkeypatch.setattr("perdure.core.pretext.make_pretext", gone)
    again = Learner.load(tmp_path / "x")
    assert torch.equal(again.predict_proba(pictures), learner.predict_proba(pictures))
    assert [task.pretext for task in again.tasks] == ["distill(teacher='tiny(seed=3)')", ""]


def test_means_are_of_the_tasks_that_were_taught() -> None:
    matrix = [[None] * 4, [None, 0.9, None, None], [None, 0.7, None, None], [None, 0.6, None, 0.8]]
    assert taught_only(matrix, {0, 2}) == [[0.9, None], [0.6, 0.8]]
    before = [row[:3] for row in matrix[:3]]
    assert taught_only(before, {0, 2}) == [[0.7]]  # as it is known after the last step
    assert taught_only([[None]], {0}) == []
    assert taught_only(before, set()) == before


def test_an_early_stop_is_refused_where_it_was_asked_for_and_else_left_out(pictures: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^Learner\.pretrain\(early_stop=1\) has no effect: leave it out$"):
        made("lora(rank=2)").pretrain(pictures, early_stop=1)
    learner = Learner.create("tiny(dim=16)", "lora(rank=2)", epochs=3, early_stop=1)
    assert len(learner.pretrain(pictures).tasks) == 1
