"""MoE-Adapters: every image by itself through the router of a task that knows it, or through the model as it was."""

from typing import Any

import pytest
import torch

from perdure.adapters.experts import Routes, routing
from perdure.backbones.clip import pocket
from perdure.backbones.tiny import tiny
from perdure.backbones.tiny_mllm import tiny_mllm
from perdure.core.learner import Core
from perdure.mechanisms.class_statistics import TaskGaussians
from perdure.mechanisms.prompting import conversation_query, query, text_query
from perdure.objectives.generate import Generate
from perdure.streams import build_stream
from perdure.training.config import make_method, make_objective
from perdure.types import Batch, Task


def whole(data: Any) -> Batch:
    return data.__getitems__(range(len(data)))


def strangers(lab: Any, count: int = 64) -> Any:
    """Images that are all noise, unlike any class of the laboratory."""
    stream = build_stream(
        f"synthetic(tasks=1, classes_per_task=2, per_class={count}, noise=9)", lab.backbone().preprocess, 77
    )
    return stream.tasks[0].train


def used(learner: Core, images: Batch) -> torch.Tensor:
    return learner.method.of("vision").task_identifier.route(query(learner, images))


def test_the_route_of_an_image_does_not_depend_on_its_batch(lab: Any) -> None:
    bench = lab.but(per_class=24, noise=2.0)
    learner = bench.taught("moe_adapters")
    data = bench.stream().tasks[1].train
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))
    mixed = data.subset(order)
    with learner.inference():
        together = torch.cat([used(learner, b) for b in learner.batches(data, 64)])
        alone = torch.cat([used(learner, b) for b in learner.batches(data, 1)])
        shuffled = torch.cat([used(learner, b) for b in learner.batches(mixed, 5)])
        features = [torch.cat([learner.encode(b) for b in learner.batches(data, size)]) for size in (64, 1)]
    assert len(set(together.tolist())) > 1
    assert torch.equal(together, alone)
    assert torch.equal(together[order], shuffled)
    torch.testing.assert_close(features[0], features[1], rtol=1e-5, atol=1e-5)


def test_experts_and_routers_read_what_enters_the_norm_before_the_mlp(lab: Any) -> None:
    learner = lab.taught("moe_adapters(known=1.0, scale=1.0)")
    (adapter, *_), images = learner.method.of("vision").adapters, whole(lab.stream().tasks[0].test)
    block = learner.backbone.get_submodule("vision.blocks.0")
    heard: dict[str, torch.Tensor] = {}
    handles = [
        block.norm2.register_forward_hook(lambda _m, args, out: heard.update(stream=args[0], normed=out)),
        block.register_forward_hook(lambda _m, _args, out: heard.update(out=out)),
    ]
    with learner.inference():
        learner.encode(images)
        routes = Routes(learner.method.of("vision").task_identifier.tasks, used(learner, images))
        plain = heard["stream"] + block.mlp(heard["normed"])
        gates = adapter._gates(heard["stream"].mean(1), routes)
        experts = [{part: adapter._all(part)[e] for part in ("down", "down_bias", "up", "up_bias")} for e in range(6)]
        added = sum(
            gates[:, e, None, None]
            * (torch.relu(heard["stream"] @ its["down"].T + its["down_bias"]) @ its["up"].T + its["up_bias"])
            for e, its in enumerate(experts)
        )
        learner.encode(images)
    for handle in handles:
        handle.remove()
    assert added.norm() > 0.01 * plain.norm()
    torch.testing.assert_close(heard["out"], plain + added, rtol=1e-4, atol=1e-4)


def test_experts_that_learnt_from_the_mlps_input_go_on_with_it(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, images = lab.taught("moe_adapters(known=1.0, scale=1.0)"), lab.stream().tasks[0].test
    old = lab.learner("moe_adapters(known=1.0, scale=1.0)")
    for task in learner.tasks:
        old.grow(task)
    old.load_state_dict(
        {k: v for k, v in learner.learnt_state().items() if not k.endswith("before_norm")}, strict=False
    )
    seen: dict[str, torch.Tensor] = {}
    first = old.backbone.get_submodule("vision.blocks.0.mlp.fc1")
    first.register_forward_pre_hook(lambda _m, args: seen.update(mlp=args[0].mean(1)))
    (adapter, *_) = old.method.of("vision").adapters
    gates = adapter._gates
    monkeypatch.setattr(adapter, "_gates", lambda read, routes: seen.update(router=read) or gates(read, routes))
    answers = old.features(images)[0]
    assert torch.equal(seen["router"], seen["mlp"])
    assert not torch.allclose(answers, learner.features(images)[0], atol=1e-3)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_the_norm_before_the_mlp_is_found_in_every_kind_of_block(tower: str, lab: Any) -> None:
    for backbone in (tiny(text=True), pocket()):
        for site in backbone.sites("fc1", None, tower):
            norm, read, given = backbone.norm_before(site), [], []
            norm.register_forward_hook(lambda _m, _args, out, given=given: given.append(out))
            backbone.get_submodule(site.layer).register_forward_pre_hook(
                lambda _m, args, read=read: read.append(args[0])
            )
            if tower == "text":
                backbone.encode_tokens(backbone.tokenised(["a cat"]))
            else:
                backbone({"image": torch.zeros(1, 3, backbone.preprocess.size, backbone.preprocess.size).byte()})
            assert torch.equal(read[0], given[0])


def test_what_no_task_knows_gets_exactly_the_pretrained_features(lab: Any) -> None:
    bench = lab.but(per_class=40, objective="zeroshot")
    learner, images = bench.taught("moe_adapters(known=0.9, scale=1.0)"), whole(strangers(bench))
    with learner.inference():
        unknown = used(learner, images) < 0
        features = learner.encode(images)
        own = learner.encode(whole(bench.stream().tasks[0].test))
    assert unknown.float().mean() > 0.5
    with torch.inference_mode():
        plain = bench.backbone()(images)
        assert torch.equal(features[unknown], plain[unknown])
        assert not torch.allclose(own, bench.backbone()(whole(bench.stream().tasks[0].test)), atol=1e-3)


def test_before_the_first_task_has_ended_nobody_knows_anything(lab: Any) -> None:
    learner, task = lab.learner("moe_adapters"), lab.stream().tasks[0]
    learner.grow(task)
    lab.descend(learner, task)
    images = whole(task.test)
    with learner.inference():
        assert torch.equal(learner.encode(images), lab.backbone()(images))


def test_images_go_to_the_task_that_they_belong_to(lab: Any) -> None:
    bench = lab.but(per_class=40, noise=0.4)
    learner, stream = bench.taught("moe_adapters"), bench.stream()
    with learner.inference():
        hits = [(used(learner, whole(task.test)) == task.index).float().mean() for task in stream]
    assert min(hits) > 0.7


def test_the_limit_leaves_the_share_of_its_own_images_outside_that_it_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(400)
    centres = torch.randn(4, 32, generator=generator)

    def drawn() -> torch.Tensor:
        return centres[labels] + 0.3 * torch.randn(len(labels), 32, generator=generator)

    for share in (0.6, 0.9):
        gaussians = TaskGaussians(8, share)
        gaussians.add(0, drawn(), labels, generator)
        assert (gaussians.route(drawn()) == 0).float().mean() == pytest.approx(share, abs=0.04)
        assert (gaussians.route(3 * drawn()) == -1).all()


def test_a_limit_comes_from_gaussians_that_have_not_seen_what_is_judged() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(60, dtype=torch.int64)
    known, fresh = torch.randn(60, 48, generator=generator), torch.randn(2000, 48, generator=generator)
    gaussians = TaskGaussians(16, 0.9)
    gaussians.add(0, known, labels, generator)
    assert (gaussians.route(fresh) == 0).float().mean() > 0.75


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_are_enough_to_identify_a_task(count: int) -> None:
    gaussians = TaskGaussians(16, 0.99)
    gaussians.add(3, torch.eye(8)[:count], torch.arange(count), torch.Generator().manual_seed(0))
    assert gaussians.tasks == [3]
    assert gaussians.route(torch.eye(8)).shape == (8,)
    assert all(torch.isfinite(value).all() for value in gaussians.gaussians.values())


def test_gates_are_the_softmax_over_the_best_scores_of_an_images_own_router(lab: Any) -> None:
    learner = lab.learner("moe_adapters(experts=4, top=2, rank=3)")
    stream = lab.stream()
    for task in stream.tasks[:2]:
        learner.grow(task)
        learner.method.end_task(learner, task)
    adapter = learner.method.of("vision").adapters[0]
    torch.manual_seed(0)
    for task in (0, 1):
        adapter.fixed[f"router/{task}"] = torch.randn(4, 16)
    for number in range(4):
        for part in ("down", "up", "down_bias", "up_bias"):
            name = f"{number}/{part}"
            (adapter.learnt if name in adapter.learnt else adapter.fixed)[name].data.normal_()
    x, y, place = torch.randn(3, 5, 16), torch.randn(3, 5, 16), torch.tensor([1, -1, 0])
    # an expert that came after a router is none of its, however low the others stand
    adapter.fixed["router/0"] = -torch.tensor([[1.0], [2.0], [3.0]]) * x[2].mean(0)
    with torch.no_grad(), routing([adapter], [Routes([0, 1], place)]):
        adapter.overhear(x)
        out = adapter(x, y, 1)
    values = {**dict(adapter.learnt.named_parameters()), **adapter.fixed}
    for i, task in enumerate(place.tolist()):
        expected = y[i].clone()
        if task >= 0:
            scores = values[f"router/{task}"] @ x[i].mean(0)
            best = scores.argsort(descending=True)[:2]
            for share, e in zip(scores[best].softmax(0), best.tolist(), strict=True):
                hidden = torch.relu(x[i] @ values[f"{e}/down"].T + values[f"{e}/down_bias"])
                expected += 0.1 * share * (hidden @ values[f"{e}/up"].T + values[f"{e}/up_bias"])
        torch.testing.assert_close(out[i], expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(out[1], y[1])


def test_the_most_used_experts_are_frozen_and_stay_as_they_are(lab: Any) -> None:
    learner, stream = lab.learner("moe_adapters(experts=6)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    frozen = [dict(adapter.fixed) for adapter in learner.method.of("vision").adapters]
    numbers = [adapter.shut for adapter in learner.method.of("vision").adapters]
    assert all(len(each) == 2 for each in numbers)
    lab.teach(learner, stream.tasks[1:])
    for adapter, before, old in zip(learner.method.of("vision").adapters, frozen, numbers, strict=True):
        assert set(old) < set(adapter.shut)
        for name, value in before.items():
            assert torch.equal(adapter.fixed[name], value), name
    assert learner.method.measures(learner)["experts"] == 6


def test_the_experts_that_are_frozen_are_those_that_the_steps_took_most(lab: Any) -> None:
    learner, task = lab.learner("moe_adapters(experts=5, freeze=3)"), lab.stream().tasks[0]
    learner.grow(task)
    adapter, method = learner.method.of("vision").adapters[0], learner.method
    learner.train()
    total = torch.zeros(5, dtype=torch.int64)
    for step in range(3):
        learner.step = step
        batch = method.batch(learner, whole(task.train))
        learner.loss(batch)
        total += adapter.chosen
        method.after_step(learner, batch)
    assert total.sum() == 3 * 16 * 2
    method.end_task(learner, task)
    assert adapter.shut == sorted(total.argsort(descending=True, stable=True)[:3].tolist())


def test_old_routers_stay_and_new_ones_are_trained(lab: Any) -> None:
    learner, stream = lab.learner("moe_adapters"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    first = learner.method.of("vision").adapters[0].fixed["router/0"].clone()
    lab.teach(learner, stream.tasks[1:2])
    adapter = learner.method.of("vision").adapters[0]
    assert torch.equal(adapter.fixed["router/0"], first)
    assert not torch.equal(adapter.fixed["router/1"], first)


def again(task: Task, index: int) -> Task:
    return Task(index, task.name, task.classes, task.names, None, task.train, task.test)


@pytest.mark.parametrize("growth", ["grow='novel'", "expand=0.5"])
def test_a_new_task_brings_experts_and_a_repeated_one_none(growth: str, lab: Any) -> None:
    bench = lab.but(per_class=40, noise=0.4)
    learner, stream = bench.learner(f"moe_adapters({growth})"), bench.stream()
    counts = []
    for index, which in enumerate((0, 0, 1, 1, 0)):
        bench.teach(learner, [again(stream.tasks[which], index)], epochs=1)
        counts.append(learner.method.measures(learner)["experts"])
    assert counts == [2, 2, 4, 4, 4]


def test_images_of_old_tasks_pass_their_own_router_in_training(lab: Any) -> None:
    learner, stream = lab.learner("moe_adapters + replay(size=8)"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    learner.train()
    moe = learner.method.parts[0]
    labels = torch.tensor([*stream.tasks[1].classes, *stream.tasks[0].classes])
    routes = moe.of("vision").in_training(learner, 4, labels)
    assert [routes[0].routers[place] for place in routes[0].place.tolist()] == [None, None, 0, 0]


def test_options_say_how_tasks_are_told_apart_and_how_much_routers_try_out(lab: Any) -> None:
    noise = []
    for share in (0.7, 0.35):
        learner = lab.learner(f"moe_adapters(experts=4, directions=3, known=0.8, noise={share})")
        learner.grow(lab.stream().tasks[0])
        mixture = learner.method.of("vision")
        assert (mixture.task_identifier.rank, mixture.task_identifier.known) == (3, 0.8)
        noise.append(mixture.in_training(learner, 4, None)[0].noise)
    torch.testing.assert_close(noise[0], 2 * noise[1])
    assert noise[0].any()


def test_routers_of_a_language_model_read_the_words_of_a_conversation() -> None:
    learner = Core(tiny_mllm(), Generate(), make_method("moe_adapters(rank=2, tower='language')"))
    learner.grow(Task(0, "", (0,), ("a",), 2))
    asked = {"conversation": [{"messages": [{"role": "user", "content": "Which colour?"}]}]}
    with learner.inference(), learner.method.applied(learner, asked, "language"):
        read = learner.method.of("language").adapters[0].routes.seen
        assert read.any()
        assert torch.equal(read, conversation_query(learner, asked).chunk(2, dim=1)[1])


TEXTS = ["a photo of a picture 0.", "a photo of a picture 3.", "something that no task has ever said"]


def read(lab: Any, spec: str = "moe_adapters(tower='text')", **changes: Any) -> Core:
    """A learner that has learnt two tasks whose class names its text tower has read."""
    bench = lab.but(objective="zeroshot", **changes)
    learner = bench.teach(bench.learner(spec), bench.stream().tasks[:2])
    with torch.no_grad():  # experts that say something
        for name, value in learner.method.of("text").adapters[0].fixed.items():
            if "up" in name:
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    return learner


def test_a_text_goes_through_the_router_that_knows_it_and_an_unknown_one_stays_as_it_was(lab: Any) -> None:
    learner = read(lab)
    plain = lab.but(objective="zeroshot").backbone().encode_text(TEXTS)
    with learner.inference():
        places = learner.method.of("text").task_identifier.route(text_query(learner, learner.backbone.tokenised(TEXTS)))
        assert places.tolist() == [0, 1, -1]
        together = learner.embed_texts(TEXTS)
        alone = torch.cat([learner.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[2], plain[2], rtol=1e-5, atol=1e-6)
    assert (together[:2] - plain[:2]).abs().amax(1).min() > 1e-3
    assert learner.constant_encoder
    assert not learner.constant_texts


def test_a_router_reads_the_mean_of_the_words_without_padding(lab: Any) -> None:
    learner = lab.but(objective="zeroshot").learner("moe_adapters(experts=3, tower='text')")
    learner.grow(lab.stream().tasks[0])
    adapter, words = learner.method.of("text").adapters[0], torch.randn(2, 4, 16)
    counted = torch.tensor([[True, True, False, False], [True, True, True, True]])
    seen = torch.stack([words[0, :2].mean(0), words[1].mean(0)])
    with torch.no_grad():
        adapter.learnt["router"].normal_()
        for number in range(3):
            adapter.learnt[f"{number}/up"].normal_()
        routes = Routes([None], torch.zeros(2, dtype=torch.int64), counted=counted)
        gates = adapter._gates(seen, routes)
        found = {}
        for each in (counted, None):
            routes.counted = each
            with routing([adapter], [routes]):
                adapter.overhear(words)
                found[each is None] = adapter(words, torch.zeros_like(words), 1)
        expected = torch.zeros_like(words)
        for i in range(2):
            for e in range(3):
                hidden = torch.relu(words[i] @ adapter.learnt[f"{e}/down"].T + adapter.learnt[f"{e}/down_bias"])
                made = hidden @ adapter.learnt[f"{e}/up"].T + adapter.learnt[f"{e}/up_bias"]
                expected[i] += adapter.scale * gates[i, e] * made
    torch.testing.assert_close(found[False], expected, rtol=1e-4, atol=1e-5)
    assert (found[True][0] - found[False][0]).abs().max() > 1e-3


def test_names_of_old_tasks_pass_their_own_router_in_training_and_count_for_none(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, stream = bench.learner("moe_adapters(experts=4, tower='both')"), bench.stream()
    bench.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    learner.train()
    routes = learner.method.of("text").in_training(learner, 4, torch.tensor(learner.objective.classes))
    assert [routes[0].routers[place] for place in routes[0].place.tolist()] == [0, 0, None, None]
    batch = learner.method.batch(learner, whole(stream.tasks[1].train))
    learner.loss(batch)
    assert [int(a.chosen.sum()) for a in learner.method.of("text").adapters] == [2 * 2, 2 * 2]  # two names, top=2
    assert [int(a.chosen.sum()) for a in learner.method.of("vision").adapters] == [16 * 2, 16 * 2]


def test_a_name_of_several_tasks_goes_to_the_latest_whatever_stands_beside_it() -> None:
    task = Task(0, "one", (0, 1), ("cat", "an animal with a rather long name"), 2)
    learner = Core(pocket(), make_objective("zeroshot"), make_method("moe_adapters(tower='text')"))
    learner.backbone.to(torch.bfloat16)
    for each in (task, Task(1, "two", (0, 2), ("cat", "dog"), 2)):
        learner.grow(each)
        learner.method.end_task(learner, each)
    for company in ([], ["dog"], ["an animal with a rather long name and many other words that pad all others"]):
        texts = [f"a photo of a {name}." for name in ("cat", *company)]
        with learner.inference():
            asked = text_query(learner, learner.backbone.tokenised(texts))
        assert learner.method.of("text").task_identifier.route(asked)[0] == 1


def test_old_names_that_a_distillation_reads_pass_their_own_routers(lab: Any) -> None:
    bench = lab.but(objective="zeroshot")
    learner, stream = bench.learner("moe_adapters(tower='text') + feature_distill(tower='text')"), bench.stream()
    bench.teach(learner, stream.tasks[:1])
    with learner.inference():
        answered = learner.objective.embed(stream.tasks[0].names).clone()
    learner.grow(stream.tasks[1])
    learner.train()
    learner.method.begin_task(learner, stream.tasks[1])
    moe, distil = learner.method
    torch.testing.assert_close(distil.name_embeddings["old"], answered)
    batch = learner.method.batch(learner, whole(stream.tasks[1].train))
    learner.loss(batch).backward()
    assert [int(a.chosen.sum()) for a in moe.of("text").adapters] == [2 * 2, 2 * 2]  # the new names only
    assert float(distil.penalty(learner, batch, learner.encode(batch)).detach()) == pytest.approx(0, abs=1e-5)


def test_names_that_tasks_share_go_to_the_latest(lab: Any) -> None:
    learner = read(lab, scenario="domain")
    texts = [f"a photo of a {name}." for name in learner.objective.names]
    with learner.inference():
        asked = text_query(learner, learner.backbone.tokenised(texts))
    assert learner.method.of("text").task_identifier.route(asked).tolist() == [1] * len(texts)


def test_how_many_experts_there_are_follows_the_length_of_the_stream() -> None:
    method = make_method("moe_adapters")
    assert method._first(Task(0, "", (0,), ("a",), 11)) == 22
    assert method._first(Task(0, "", (0,), ("a",), None)) == 8
    assert make_method("moe_adapters(grow='novel')")._first(Task(0, "", (0,), ("a",), 11)) == 2
