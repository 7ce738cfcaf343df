"""Prompts that a text chooses by what the pre-trained tower makes of it: who chooses what, in training and after."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.training.config import make_method, make_objective

SPECS = pytest.mark.parametrize("spec", ["l2p(top=2, tower={!r})", "dualprompt(tower={!r})", "coda_prompt(tower={!r})"])
TEXTS = ["a photo of a picture 0.", "a photo of a picture 3.", "something else, and longer"]


def taught(lab: Any, spec: str, tasks: int = 2) -> Core:
    bench = lab.but(objective="zeroshot")
    return bench.teach(bench.learner(spec), bench.stream().tasks[:tasks])


def queries(lab: Any, texts: list[str]) -> Tensor:
    """Unit embeddings by a model that was never touched."""
    with torch.no_grad():
        return F.normalize(lab.but(objective="zeroshot").backbone().encode_text(texts), dim=1)


@SPECS
def test_an_embedding_depends_on_its_own_text_alone(spec: str, lab: Any) -> None:
    learner = taught(lab, spec.format("text"))
    with learner.inference():
        together = learner.embed_texts(TEXTS)
        alone = torch.cat([learner.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert learner.embed_texts([]).shape == (0, 16)


def test_texts_take_the_pools_nearest_entries_and_pull_their_keys(lab: Any) -> None:
    learner = taught(lab, "l2p(pool=4, length=2, top=2, strength=0.3, tower='text')")
    pool, asked = learner.method.of("text"), queries(lab, TEXTS)
    with torch.no_grad():
        pool.prompts.normal_(generator=torch.Generator().manual_seed(1))
        cosines = torch.stack([F.cosine_similarity(asked, key[None]) for key in pool.keys], 1)
        best = cosines.topk(2, dim=1)
        expected = []
        for text, entries in zip(TEXTS, best.indices, strict=True):
            with pool.tokens.using(torch.cat([pool.prompts[i] for i in entries])):
                expected.append(learner.backbone.encode_text([text]))
        torch.testing.assert_close(learner.embed_texts(TEXTS), torch.cat(expected), rtol=1e-4, atol=1e-5)
    texts, labels = learner.objective.texts(learner, {})
    assert texts == [f"a photo of a {name}." for name in learner.task.names]
    assert labels.tolist() == list(learner.task.classes)
    own = queries(lab, texts)
    cosines = own @ F.normalize(pool.keys.detach(), dim=1).T
    wanted = -0.3 * cosines.topk(2, dim=1).values.sum(1).mean()
    torch.testing.assert_close(learner.method.penalty(learner, {}, torch.empty(0)).detach(), wanted)


def test_in_training_a_text_takes_its_own_tasks_prompt_and_later_the_nearest_keys(lab: Any) -> None:
    learner = taught(lab, "dualprompt(tower='text')")
    own, texts = learner.method.of("text"), [f"a photo of a {name}." for name in learner.objective.names]
    assert len(texts) == 4
    with torch.no_grad():
        own.past["prompts"] = torch.randn(own.past["prompts"].shape, generator=torch.Generator().manual_seed(1))
        keys = torch.cat([own.past["keys"], own.key[None]])
    prompts = torch.cat([own.past["prompts"], own.prompt[None].detach()])

    @torch.no_grad()
    def with_those_of(tasks: list[int]) -> Tensor:
        with own.general.using(own.shared.unbind()), own.expert.using(prompts[tasks].unbind(1)):
            return learner.backbone.encode_text(texts)

    learner.train()
    labels = torch.tensor(learner.objective.classes)
    told = learner.embed_texts(texts, labels).detach()
    torch.testing.assert_close(told, with_those_of([0, 0, 1, 1]), rtol=1e-4, atol=1e-5)
    nearest = (queries(lab, texts) @ F.normalize(keys, dim=1).T).argmax(1).tolist()
    torch.testing.assert_close(learner.embed_texts(texts).detach(), with_those_of(nearest), rtol=1e-4, atol=1e-5)
    learner.eval()
    # whose they are is not told where answers are wanted
    torch.testing.assert_close(
        learner.embed_texts(texts, labels).detach(), with_those_of(nearest), rtol=1e-4, atol=1e-5
    )
    pulled = learner.method.penalty(learner, {}, torch.empty(0)).detach()
    torch.testing.assert_close(pulled, -F.cosine_similarity(queries(lab, texts[2:]), own.key.detach()[None]).mean())


def test_names_of_a_domain_stream_are_answered_with_the_prompt_they_were_trained_with(lab: Any) -> None:
    bench = lab.but(objective="zeroshot", scenario="domain")
    learner = bench.teach(bench.learner("dualprompt(tower='both')"), bench.stream().tasks)
    text, vision = learner.method.of("text"), learner.method.of("vision")
    assert text.owner.tolist() == [2, 2]
    assert (text.idle.tolist(), vision.idle.tolist()) == ([True, True, False], [False] * 3)
    texts, classes = [f"a photo of a {name}." for name in learner.objective.names], torch.tensor([0, 1])
    with torch.no_grad():
        text.past["prompts"] = torch.randn(text.past["prompts"].shape)
        trained = learner.train().embed_texts(texts, classes)
        torch.testing.assert_close(learner.eval().embed_texts(texts), trained)


@pytest.mark.parametrize("method", ["l2p", "dualprompt", "coda_prompt", "moe_adapters", "feature_distill"])
def test_a_text_tower_that_nobody_reads_with_is_refused_before_anything_is_learnt(method: str, lab: Any) -> None:
    bench, more = lab.but(objective="classify"), "lora(tower='both') + " if method == "feature_distill" else ""
    learner = Core(tiny(text=True), make_objective("classify"), make_method(f"{more}{method}(tower='both')"))
    task = bench.stream().tasks[0]

    def prepared() -> None:
        learner.grow(task)
        learner.method.check(learner, task)

    with pytest.raises(ValueError, match=rf"^{method}\(tower='both'\): this objective reads no texts: use --objective"):
        prepared()


def test_captions_of_replayed_images_take_their_own_tasks_prompt(lab: Any) -> None:
    bench = lab.but(objective="retrieve")
    learner = bench.teach(bench.learner("dualprompt(tower='text') + replay(size=6)"), bench.stream().tasks[:2])
    dual = next(iter(learner.method))
    told: list[list[int]] = []
    joining = dual.of("text").joining
    dual.of("text").joining = lambda asked, labels: told.append(labels.tolist()) or joining(asked, labels)
    learner.train()
    batch = learner.method.batch(learner, bench.stream().tasks[1].train.__getitems__(range(4)))
    assert len(set(batch["label"].tolist())) > 1
    learner.loss(batch).backward()
    assert told[0] == batch["label"][learner.objective.chosen(batch)[0]].tolist()


def test_texts_are_mixed_prompts_by_the_papers_sum(lab: Any) -> None:
    learner = taught(lab, "coda_prompt(components=2, tower='text')")
    own, asked = learner.method.of("text"), queries(lab, TEXTS)
    keys, filters, prompts = (torch.cat([own.past[n], own.new[n].detach()], 1) for n in ("key", "filter", "prompt"))
    blocks = []
    for k, a, p in zip(keys, filters, prompts, strict=True):
        weights = F.cosine_similarity(asked[:, None] * a, k[None].expand(len(TEXTS), -1, -1), dim=2)
        blocks.append(torch.einsum("bm,mld->bld", weights, p))
    with torch.no_grad():
        with own.prefix.using(blocks):
            expected = learner.backbone.encode_text(TEXTS)
        torch.testing.assert_close(learner.embed_texts(TEXTS), expected, rtol=1e-4, atol=1e-5)
