"""Retrieval: the contrastive loss, which captions are shown, what is measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.core.objective import Competitors
from perdure.mechanisms.moments import second_moments
from perdure.objectives.retrieve import Retrieve, _Gallery, embedded
from perdure.training.config import make_method
from perdure.training.run import run
from perdure.types import Encoded


@pytest.fixture
def bench(lab: Any) -> Any:
    return lab.but(objective="retrieve")


def test_the_loss_is_clips_where_every_image_has_one_caption() -> None:
    scores = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(6)
    losses = Retrieve.contrast(scores, torch.tensor([4, 9, 1, 7, 3, 8]), rows)
    clip = (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, rows)) / 2
    torch.testing.assert_close(losses.mean(), clip)


def test_captions_of_one_image_are_no_negatives_of_each_other() -> None:
    scores = torch.zeros(4, 4, requires_grad=True)
    Retrieve.contrast(scores, torch.tensor([5, 5, 2, 3]), torch.arange(4)).sum().backward()
    together = scores.grad[:2, :2]
    assert (together < 0).all()  # every pair of the image is drawn together
    assert (scores.grad[:2, 2:] > 0).all()
    assert (scores.grad[2:, :2] > 0).all()


def test_several_captions_an_image_share_the_target() -> None:
    image_of = torch.tensor([0, 0, 1])
    perfect = torch.tensor([[50.0, 50.0, -50.0], [-50.0, -50.0, 50.0]])
    losses = Retrieve.contrast(perfect, torch.tensor([1, 2]), image_of)
    # two captions that fit equally well: log 2 is the least that an even target allows from image to text
    torch.testing.assert_close(losses, torch.tensor([torch.log(torch.tensor(2.0)) / 2, 0.0]))


def said(batch: Any, chosen: tuple[torch.Tensor, torch.Tensor]) -> list[str]:
    return [batch["text"][row][place] for row, place in zip(*map(torch.Tensor.tolist, chosen), strict=True)]


def test_a_step_shows_one_caption_of_each_image_and_another_one_later(bench: Any) -> None:
    learner, stream = bench.learner("probe"), bench.stream()
    learner.grow(stream.tasks[0])
    batch = stream.tasks[0].train.__getitems__(range(8))
    shown = []
    for step in range(12):
        learner.step = step
        rows, places = learner.objective.chosen(batch)
        assert rows.tolist() == list(range(8))
        assert all(said(batch, (rows, places)))
        again = learner.objective.chosen(batch)
        assert torch.equal(places, again[1])
        shown.append(tuple(places.tolist()))
    assert len(set(shown)) > 1
    assert {place for each in shown for place in each} == {0, 1}


def test_missing_captions_are_never_shown_and_all_can_be(bench: Any) -> None:
    learner, stream = bench.learner("probe"), bench.stream()
    learner.grow(stream.tasks[0])
    batch = {"text": [("one",), ("two", "three", "four")], "label": torch.zeros(2, dtype=torch.int64)}
    for step in range(8):
        learner.step = step
        rows, places = learner.objective.chosen(batch)
        assert rows.tolist() == [0, 1]
        assert all(said(batch, (rows, places)))
    learner.objective.captions = None
    rows, places = learner.objective.chosen(batch)
    assert said(batch, (rows, places)) == ["one", "two", "three", "four"]


def test_recorded_captions_equal_encoded_ones_and_are_recorded_only_where_the_text_tower_is_constant(
    bench: Any,
) -> None:
    stream = bench.stream()
    task, data = stream.tasks[0], stream.tasks[0].train
    for method, recorded in (("lora(rank=2)", True), ("lora(rank=2, tower='both')", False), ("finetune", True)):
        learner = bench.learner(method)
        learner.grow(task)
        kept = learner.cache.precomputed(data)
        assert isinstance(kept, Encoded) == recorded
        batch = kept.__getitems__([3, 0, 5])
        assert ("captions" in batch) == recorded
        if recorded:
            torch.testing.assert_close(batch["captions"], embedded(learner, batch["text"]))
            plain = learner.objective.loss(learner.encode(batch), data.__getitems__([3, 0, 5]))
            torch.testing.assert_close(learner.objective.loss(learner.encode(batch), batch), plain)


def test_a_pair_by_itself_competes_with_the_others_of_its_task_as_they_are(bench: Any) -> None:
    learner, task = bench.learner("finetune(tower='both') + ewc"), bench.stream().tasks[0]
    learner.grow(task)
    learner.train()
    batch, objective = task.train.__getitems__(range(6)), learner.objective
    others = objective.competitors(learner, batch)
    rivals = Competitors(others=others)
    for i in range(6):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        # the same caption of each, whatever the size of the batch
        rows, places = objective.chosen(one)
        together = others["texts"].detach().clone()
        together[i] = learner.embed_texts(said(one, (rows, places)))[0]
        scores = objective.similarity(learner.encode(batch), together)
        expected = Retrieve.contrast(scores, batch["pair"], torch.arange(6))[i]
        found = objective.example_loss(learner.encode(one), one, rivals)
        torch.testing.assert_close(found, expected)
        answers = objective.example_scores(learner.encode(one), one, rivals)
        rest = [j for j in range(6) if j != i]
        forth = objective.similarity(learner.encode(one), others["texts"][rest])[0]
        back = objective.similarity(learner.embed_texts(said(one, (rows, places))), others["features"][rest])[0]
        torch.testing.assert_close(answers, torch.cat([forth, back]))


@pytest.mark.parametrize("method", ["mas", "ewc"])
def test_importance_of_pairs_is_that_of_a_loop(method: str, bench: Any) -> None:
    learner, task = bench.learner(f"finetune(tower='both') + {method}(samples=5)"), bench.stream().tasks[0]
    learner.grow(task)
    bench.close(learner, task)
    part = list(learner.method)[1]
    purpose = "fisher" if method == "ewc" else "importance"
    views = next(learner.training_views(task.train, 5, purpose))
    alone = [learner.objective.example(views, i) for i in range(5)]
    assert len(set(learner.objective.chosen(views)[1].tolist())) > 1  # unlike captions of unlike images
    others = next(learner.training_views(task.train, 64, f"{purpose} company"))
    assert len(others["pair"]) > 5
    others = {name: value.detach() for name, value in learner.objective.competitors(learner, others).items()}
    total = {name: torch.zeros_like(p) for name, p in learner.shared().items()}
    for one in alone:
        learner.zero_grad()
        features, objective = learner.encode(one), learner.objective
        if method == "ewc":
            objective.example_loss(features, one, Competitors(others=others)).backward()
        else:
            objective.example_scores(features, one, Competitors(others=others)).square().sum().backward()
        for name, p in learner.shared().items():
            if p.grad is not None:
                total[name] += p.grad.square() if method == "ewc" else p.grad.abs()
    every = sum(value.sum() for value in total.values()) / sum(value.numel() for value in total.values())
    for name, value in total.items():
        torch.testing.assert_close(part.quadratic_penalty.weights[name], value / every, rtol=1e-3, atol=1e-5)
    assert any("text" in name and value.any() for name, value in total.items())


def test_retrieval_without_captions_or_without_a_text_tower_says_what_to_use(bench: Any, tmp_path: Path) -> None:
    stream = "synthetic(tasks=2, test_per_class=4)"
    with pytest.raises(
        ValueError,
        match=r"^retrieve learns captions, which synthetic.* has not: give a stream of captions, or use --obj",
    ):
        run(bench.config("probe", stream=stream), tmp_path / "a")
    with pytest.raises(ValueError, match=r"^retrieve needs a text tower"):
        run(bench.config("probe", backbone="tiny()"), tmp_path / "b")


def test_training_finds_more_and_the_summary_says_what(bench: Any, tmp_path: Path) -> None:
    summary = run(bench.config("finetune(tower='both')", epochs=12, batch_size=12), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    value = {(row["after"], row["on"], row["metric"]): row["value"] for row in rows}
    assert summary["score"] == "recall"
    six = [f"{way}@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    for task in range(3):
        union = [value[2, task, f"union/{name}"] for name in six]
        assert value[2, task, "recall"] == pytest.approx(sum(union) / 6) == summary["matrix"][2][task]
        assert summary["recall"]["union"]["rsum"][task] == pytest.approx(100 * sum(union))
        assert all(value[2, task, f"own/{name}"] >= value[2, task, f"union/{name}"] for name in six)
    assert value[0, 0, "recall"] == value[0, 0, "recall_own_gallery"]  # the first task is all there is
    assert summary["matrix"][2][2] > value[-1, 2, "recall"]  # what was just learnt, before anything was
    assert summary["acc_with_task_id"] == pytest.approx(sum(value[2, j, "recall_own_gallery"] for j in range(3)) / 3)


def test_the_same_image_in_two_languages_stands_in_the_union_once(bench: Any) -> None:
    both = bench.but(scenario="domain")
    learner, stream = both.learner("probe"), both.stream()
    for task in stream:
        learner.grow(task)
    single = learner.objective.evaluate(learner, [stream.tasks[1]])[0]
    joint = learner.objective.evaluate(learner, list(stream.tasks))[1]
    # texts look for images, which are the same ones whatever the languages
    assert [joint[f"union/t2i@{k}"] for k in (1, 5, 10)] == [single[f"own/t2i@{k}"] for k in (1, 5, 10)]


def test_captions_in_another_language_do_not_answer_for_this_one(bench: Any) -> None:
    learner = bench.but(scenario="domain").learner("probe")
    draw = torch.Generator().manual_seed(0)
    images, pairs = F.normalize(torch.randn(30, 8, generator=draw), dim=1), torch.arange(30)
    strange = F.normalize(torch.randn(30, 8, generator=draw), dim=1)
    known, unknown = _Gallery(images, pairs, images, pairs), _Gallery(images, pairs, strange, pairs)
    learner.objective._galleries = lambda *_: [known, unknown]
    tasks = bench.but(scenario="domain").stream().tasks[:2]
    first, second = learner.objective.evaluate(learner, list(tasks))
    assert first["union/i2t@1"] == 1.0
    assert second["union/i2t@1"] <= second["own/i2t@1"] < 0.2


def test_a_stop_after_the_last_step_changes_nothing(bench: Any, content_of: Any, tmp_path: Path) -> None:
    method = "inflora(rank=2, tower='text')"
    stream = "captions_synthetic(tasks=2, captions=5, test_per_task=8)"
    run(bench.config(method, stream=stream), tmp_path / "whole")
    bench.broken_run(method, tmp_path / "broken", (0, 4), save_every=4, stream=stream)
    assert content_of(tmp_path / "whole") == content_of(tmp_path / "broken")


def test_moments_of_the_text_tower_leave_padding_out(bench: Any) -> None:
    learner, stream = bench.learner("lora(rank=2, tower='text')"), bench.stream()
    learner.grow(stream.tasks[0])
    backbone = learner.backbone
    site = backbone.sites("q", tower="text")[0]
    layer = {"layer": backbone.get_submodule(site.layer)}
    short, long = "a dog", "a very long caption of a dog"

    def moments(texts: list[str]) -> torch.Tensor:
        return second_moments(lambda _: backbone.encode_text(texts), layer, [{}], lambda _: backbone.token_groups(""))[
            "layer"
        ]

    together = moments([short, long])
    counts = torch.tensor([len(short), len(long)], dtype=torch.float64)
    apart = torch.stack([moments([short]), moments([long])])
    torch.testing.assert_close(together, (apart * counts[:, None, None]).sum(0) / counts.sum(), rtol=1e-5, atol=1e-7)


def test_replayed_pairs_are_negatives_of_new_ones(bench: Any) -> None:
    learner, stream = bench.learner("lora(rank=2, tower='both') + replay(size=6)"), bench.stream()
    bench.teach(learner, stream.tasks[:1], epochs=1)
    learner.grow(stream.tasks[1])
    learner.method.begin_task(learner, stream.tasks[1])
    batch = learner.method.batch(learner, stream.tasks[1].train.__getitems__(range(6)))
    assert set(batch["label"].tolist()) == {0, 1}
    features, batch = learner.encode(batch), learner.objective.embed_texts(learner, batch)
    scores = learner.objective.similarity(features, batch["texts"]).detach().requires_grad_()
    learner.objective.contrast(scores, batch["pair"], batch["image_of"]).sum().backward()
    other = batch["label"][:, None] != batch["label"][batch["image_of"]][None]
    assert (scores.grad[other] > 0).all()


def test_lwf_at_strength_zero_is_plain_training_bit_for_bit(bench: Any) -> None:
    plain, held = (
        bench.taught(m).learnt_state()
        for m in ("lora(rank=2, tower='both')", "lora(rank=2, tower='both') + lwf(strength=0)")
    )
    of = lambda memory: {k.replace("method.parts.0.", "method."): v for k, v in memory.items()}  # noqa: E731
    assert all(torch.equal(value, of(plain)[key]) for key, value in of(held).items() if key in of(plain))
    assert make_method("lora + lwf").spec == "lora + lwf"
