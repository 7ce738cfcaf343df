"""What parts of one kind share: without strength they are not there, and what serves one task is gone after it."""

from functools import cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from perdure.core.caching import Cache
from perdure.mechanisms.prompting import query
from perdure.training.loop import fit_task

CLASSES, NAMES, PAIRS = "classify", "zeroshot", "retrieve"
# A carrier, a part beside it that is told to do nothing, and the objective.
IDLE = [
    *((carrier, part, CLASSES) for part in ("ewc(strength=0)", "si(strength=0)", "mas(strength=0)", "lwf(strength=0)")
      for carrier in ("lora(rank=2)", "finetune")),
    ("lora(rank=2)", "ewc(strength=0, form='offline')", CLASSES),
    ("lora(rank=2)", "ewc(strength=0, of='updates')", CLASSES),
    ("lora(rank=2)", "mas(strength=0, of='updates')", CLASSES),
    ("inflora(rank=2)", "lwf(strength=0)", CLASSES),
    *((carrier, "feature_distill(strength=0)", CLASSES) for carrier in ("lora(rank=2)", "finetune", "fm_lora(rank=4)")),
    *((carrier, "derpp(alpha=0, beta=0)", CLASSES) for carrier in ("lora(rank=2)", "finetune")),
    ("finetune", "weight_average(form='wise', alpha=1)", CLASSES),
    ("finetune(tower='both')", "zscl(strength_image=0, strength_text=0, anchor=0)", NAMES),
    ("finetune(tower='both')", "mod_x(strength=0)", PAIRS),
]  # fmt: skip
# Parts that need a teacher, names or a mean while a task is learnt.
PASSING = [
    ("lora(rank=2)", "lwf", CLASSES),
    ("lora(rank=2)", "feature_distill", CLASSES),
    ("finetune", "weight_average", CLASSES),
    ("lora(rank=2, tower='both')", "feature_distill(tower='both')", NAMES),
    ("finetune", "zscl", NAMES),
    ("finetune(tower='both')", "mod_x", PAIRS),
]
placed = pytest.mark.parametrize(("carrier", "part", "objective"), IDLE)


@pytest.fixture(scope="module")
def taught(lab: Any) -> Any:
    """A learner that has learnt the whole stream; not to be changed."""
    return cache(lambda spec, objective: lab.but(objective=objective).taught(spec))


@placed
def test_a_part_without_strength_leaves_its_carrier_as_it_is_bit_for_bit(
    carrier: str, part: str, objective: str, taught: Any
) -> None:
    plain, idle = taught(carrier, objective), taught(f"{carrier} + {part}", objective)
    found = idle.learnt_state()
    for key, value in plain.learnt_state().items():
        assert torch.equal(found[key.replace("method.", "method.parts.0.")], value), key
    assert [p.requires_grad for p in idle.objective.parameters()] == [
        p.requires_grad for p in plain.objective.parameters()
    ]


@pytest.mark.parametrize(("carrier", "part", "objective"), PASSING)
def test_what_serves_one_task_is_stored_within_it_and_gone_after_it(
    carrier: str, part: str, objective: str, lab: Any, taught: Any
) -> None:
    bench = lab.but(objective=objective)
    learner, stream = bench.learner(f"{carrier} + {part}"), bench.stream()
    bench.teach(learner, stream.tasks[:1], epochs=1)
    learner.grow(stream.tasks[1])
    bench.descend(learner, stream.tasks[1], steps=1)
    if part != "zscl":  # whose teacher is the pre-trained model, which no state repeats
        assert any(key.startswith("method.parts.1.") for key in learner.learnt_state())
    plain, held = taught(carrier, objective).learnt_state(), taught(f"{carrier} + {part}", objective).learnt_state()
    assert held.keys() == {key.replace("method.", "method.parts.0.") for key in plain}


@pytest.mark.parametrize("part", ["lwf", "feature_distill"])
def test_of_a_test_set_nothing_is_recorded_for_it_is_kept_longer_than_a_teacher(part: str, lab: Any) -> None:
    learner, stream = lab.learner(f"lora(rank=2) + {part}"), lab.stream()
    lab.teach(learner, stream.tasks[:1])
    learner.grow(stream.tasks[1])
    lab.descend(learner, stream.tasks[1])
    batch = stream.tasks[1].train.__getitems__(range(8))
    assert any(name.startswith(f"{part}/") for name in learner.cache.complete(batch))
    with learner.inference():
        assert learner.cache.complete(batch).keys() == batch.keys()
        assert torch.isfinite(learner.method.penalty(learner, batch, learner.encode(batch)))


@pytest.mark.parametrize("spec", ["prompt(tokens=3, deep=True)", "l2p", "prefix", "dualprompt", "coda_prompt"])
def test_a_frozen_encoder_in_half_precision_trains_prompts_in_float32(spec: str, lab: Any) -> None:
    learner = lab.learner(spec)
    learner.precision = torch.bfloat16
    lab.teach(learner, lab.stream().tasks[:1], epochs=1)
    assert {p.dtype for p in learner.trainable().values()} == {torch.float32}
    assert {p.dtype for p in learner.backbone.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("spec", ["l2p", "dualprompt", "coda_prompt"])
def test_queries_are_those_of_the_pretrained_encoder_asked_once_a_task_or_in_every_step(
    spec: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, learners, seen = lab.stream().tasks[0], [lab.learner(spec) for _ in range(2)], []
    for learner in learners:
        learner.grow(task)
    recorded = learners[0].cache.precomputed(task.train).__getitems__([3, 1])["query"]
    images = task.train.__getitems__([3, 1])
    first = learners[0].backbone.get_submodule(learners[0].backbone.blocks()[0])
    first.register_forward_pre_hook(lambda _block, args: seen.append(len(args[0])))
    fit_task(learners[0], task, lab.train_config(epochs=3, lr=1e-3))
    assert sum(seen) == (1 + 3) * len(task.train)
    torch.testing.assert_close(recorded, F.normalize(lab.backbone()(images), dim=1), rtol=1e-5, atol=1e-6)
    assert (learners[0].encode(images) - lab.backbone()(images)).abs().max() > 1e-3
    torch.testing.assert_close(query(learners[0], images), recorded, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(Cache, "precomputed", lambda _cache, data: data)
    fit_task(learners[1], task, lab.train_config(epochs=3, lr=1e-3))
    for name, value in learners[0].learnt_state().items():
        torch.testing.assert_close(value, learners[1].learnt_state()[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("carrier", "part", "share"),
    [("lora(rank=2)", "gem", 0.75), ("finetune(backbone_lr=1.0)", "agem", 0.9)],
)
def test_under_projected_gradients_the_old_loss_rises_less(carrier: str, part: str, share: float, lab: Any) -> None:
    bench = lab.but(noise=0.3, lr=5e-2 if part == "gem" else lab.lr)
    batch = bench.stream().tasks[0].train.__getitems__(range(16))

    def loss(spec: str) -> float:
        learner = bench.taught(spec, epochs=4)
        with torch.no_grad():
            return float(learner.objective.losses(learner.encode(batch), batch, only_task=False).mean())

    assert loss(f"{carrier} + {part}") < share * loss(carrier)


@pytest.mark.parametrize("tower", ["vision", "text", "both"])
@pytest.mark.parametrize(
    "spec", ["prompt(tower={!r})", "prompt(deep=True, tower={!r})", "prefix(tower={!r})", "l2p(top=2, tower={!r})",
             "dualprompt(tower={!r})", "coda_prompt(tower={!r})"]
)  # fmt: skip
def test_prompts_change_the_tower_that_was_asked_for_and_no_other(spec: str, tower: str, lab: Any) -> None:
    bench = lab.but(objective=NAMES)
    learner, task, plain = bench.learner(spec.format(tower)), bench.stream().tasks[0], bench.backbone()
    learner.grow(task)
    assert (learner.constant_texts, learner.constant_encoder) == (tower == "vision", tower == "text")
    before = {name: p.detach().clone() for name, p in learner.method.named_parameters()}
    fit_task(learner, task, bench.train_config())
    after = dict(learner.method.named_parameters())
    assert before
    assert [name for name, value in before.items() if torch.equal(after[name], value)] == []
    images, texts = task.test.__getitems__(range(4)), ["a photo of a picture 0.", "something else, and longer"]
    with learner.inference():
        seen, read = learner.encode(images), learner.embed_texts(texts)
        assert ((seen - plain(images)).abs().max() > 1e-3) == (tower != "text")
        assert ((read - plain.encode_text(texts)).abs().max() > 1e-3) == (tower != "vision")
