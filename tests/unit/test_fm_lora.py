"""FM-LoRA: bases never change after the first task, boundaries are continuous, and each part can be switched off."""

from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.adapters.injection import detach, prompted, updates
from perdure.adapters.prompt_tokens import PromptTokens
from perdure.backbones.tiny import tiny
from perdure.core.learner import Core
from perdure.training.config import make_method, make_objective
from perdure.types import Batch, Stream, Task


def begun(lab: Any, spec: str, tasks: int = 1) -> tuple[Core, Stream, Batch]:
    """A learner that has learnt some tasks, its stream, and images of the first task."""
    learner, stream = lab.learner(spec), lab.stream()
    for task in stream.tasks[:tasks]:
        learner.grow(task)
        lab.descend(learner, task)
        lab.close(learner, task)
    return learner, stream, stream.tasks[0].test.__getitems__(range(8))


def logits(learner: Core, images: Batch, columns: int = 2) -> Tensor:
    with torch.no_grad():
        return learner.objective.scores(learner.encode(images))[:, :columns].clone()


def answers(learner: Core, images: Batch) -> Tensor:
    with learner.inference():
        return learner.encode(images).clone()


# Bases and cores


def test_bases_are_orthonormal_after_the_first_task_and_byte_identical_ever_after(lab: Any) -> None:
    learner, stream, _ = begun(lab, "fm_lora(rank=4)")
    bases = list(learner.method.bases)
    kept = [(adapter.down.detach().clone(), adapter.up.detach().clone()) for adapter in bases]
    assert len(kept) == 4  # q and v of two blocks
    for down, up in kept:
        torch.testing.assert_close(down @ down.T, torch.eye(4), rtol=0, atol=1e-6)
        torch.testing.assert_close(up.T @ up, torch.eye(4), rtol=0, atol=1e-6)
    for task in stream.tasks[1:]:
        learner.grow(task)
        lab.descend(learner, task)
        lab.close(learner, task)
    for adapter, (down, up) in zip(bases, kept, strict=True):
        assert adapter.down.detach().numpy().tobytes() == down.numpy().tobytes()
        assert adapter.up.detach().numpy().tobytes() == up.numpy().tobytes()


def test_the_first_task_is_lora_of_the_bases_rank(lab: Any) -> None:
    task = lab.stream().tasks[:1]
    ours, lora = (lab.teach(lab.learner(s), task) for s in ("fm_lora(rank=4, prompts=0)", "lora(rank=4, at='qv')"))
    # the same draws in the same order, and the identity between them
    torch.testing.assert_close(ours.features(task[0].test)[0], lora.features(task[0].test)[0], rtol=1e-4, atol=1e-4)
    assert ours.method.measures(ours) == {"rank": 4}


def test_a_later_task_trains_two_small_matrices_a_layer(lab: Any) -> None:
    learner, stream, _ = begun(lab, "fm_lora(rank=4, ranks=2, drs='fixed', prompts=0)")
    learner.grow(stream.tasks[1])
    trained = {k: tuple(p.shape) for k, p in learner.trainable().items() if not k.startswith("objective")}
    assert sorted(trained.values()) == [(2, 4)] * 4 + [(4, 2)] * 4
    for adapter in learner.method.bases:
        left, right = adapter.branch
        torch.testing.assert_close(left.T @ left, torch.eye(2), rtol=0, atol=1e-6)
        assert not right.any()


def test_accumulated_cores_add_up_in_one_of_constant_size(lab: Any) -> None:
    learner, stream, _ = begun(lab, "fm_lora(rank=4, ranks=2, drs='fixed')")
    before = [adapter.core.clone() for adapter in learner.method.bases]
    learner.grow(stream.tasks[1])
    lab.descend(learner, stream.tasks[1])
    steps = [(adapter.branch[0] @ adapter.branch[1]).detach() for adapter in learner.method.bases]
    lab.close(learner, stream.tasks[1])
    for adapter, was, step in zip(learner.method.bases, before, steps, strict=True):
        torch.testing.assert_close(adapter.core, was + step)
        assert list(adapter.merged) == ["core"]
        assert torch.linalg.matrix_rank(step) <= 2


def test_without_shared_bases_each_task_has_a_fresh_lora(lab: Any) -> None:
    learner, stream, _ = begun(lab, "fm_lora(rank=4, share=False, ranks=3, drs='fixed', prompts=0)")
    assert not learner.method.bases
    for task in stream.tasks[1:]:
        learner.grow(task)
        assert {len(branch.down) for branch in learner.method.branches} == {3}
        lab.descend(learner, task)
        lab.close(learner, task)
        assert all(branch.down is None for branch in learner.method.branches)


def test_rank_and_complexity_of_every_task_are_measured(lab: Any) -> None:
    for share, first in ((True, {"rank"}), (False, {"rank", "complexity"})):
        learner, stream = lab.learner(f"fm_lora(rank=4, share={share})"), lab.stream()
        for task in stream:
            lab.teach(learner, [task], epochs=1)
            measures = learner.method.measures(learner)
            assert set(measures) == (first if task.index == 0 else {"rank", "complexity"})
            assert measures["rank"] in ((4,) if share and task.index == 0 else (1, 2, 4))


def test_bases_that_are_frozen_hold_no_gradients(lab: Any) -> None:
    learner, stream, _ = begun(lab, "fm_lora(rank=4)", tasks=0)
    learner.grow(stream.tasks[0])
    lab.descend(learner, stream.tasks[0])
    assert all(adapter.down.grad is not None for adapter in learner.method.bases)
    lab.close(learner, stream.tasks[0])
    assert all(adapter.down.grad is None and adapter.up.grad is None for adapter in learner.method.bases)


@pytest.mark.parametrize("spec", ["fm_lora(rank=4)", "fm_lora(rank=4, share=False)"])
@pytest.mark.parametrize("order", ["{} + ewc", "ewc + {}"])
def test_ewc_holds_what_all_tasks_train_and_no_core_of_one_task(spec: str, order: str, lab: Any) -> None:
    learner, names = lab.learner(order.format(spec)), set()
    for task in lab.stream().tasks[:2]:
        lab.teach(learner, [task], epochs=1)
        (guard,) = (part for part in learner.method.parts if part.name == "ewc")
        names = {name.split(".", 3)[-1] for name in guard.fisher if name.startswith("method.")}
        assert all(guard.fisher[name].any() for name in guard.fisher)
    assert names == {"tokens.vision.values"}


# Prompt tokens


def test_no_prompts_means_no_tokens(lab: Any) -> None:
    learner, _, _ = begun(lab, "fm_lora(rank=4, prompts=0)")
    assert not learner.method.tokens
    assert not prompted(learner.backbone)
    assert not any("tokens" in key or "prompt" in key for key in learner.state_dict())


def test_tokens_pass_through_the_blocks_and_are_dropped_at_the_end(lab: Any) -> None:
    backbone, images = lab.backbone(), lab.stream().tasks[0].test.__getitems__(range(3))
    blocks = [backbone.get_submodule(name) for name in backbone.blocks()]
    plain, tokens = backbone(images), PromptTokens(5, 16)
    tokens.attach(blocks)
    inside, outside = [], []
    for block in blocks:
        block.attn.register_forward_hook(lambda _m, args, _y: inside.append(args[0].shape[1]))
        block.register_forward_hook(lambda _m, _args, y: outside.append(y.shape[1]))
    features = backbone(images)
    assert inside == [17 + 5] * 2  # 16 patches and the class token
    assert outside == [22, 17]
    assert prompted(backbone)
    assert (features - plain).abs().max() > 0
    tokens.off = True
    assert torch.equal(backbone(images), plain)
    tokens.off = False
    detach(backbone)
    assert not prompted(backbone)
    assert torch.equal(backbone(images), plain)


def test_tokens_change_features_through_attention_and_not_by_their_order(lab: Any) -> None:
    backbone, images = lab.backbone(), lab.stream().tasks[0].test.__getitems__(range(3))
    tokens = PromptTokens(5, 16)
    tokens.attach([backbone.get_submodule(name) for name in backbone.blocks()])
    with torch.no_grad():
        tokens.values.normal_(generator=torch.Generator().manual_seed(0))
        one = backbone(images)
        tokens.values.copy_(tokens.values.flip(0).clone())
        torch.testing.assert_close(backbone(images), one, rtol=1e-5, atol=1e-5)


def test_prompts_learn_more_gently_after_the_first_task(lab: Any) -> None:
    learner, stream = lab.learner("fm_lora(rank=4)"), lab.stream()
    learner.grow(stream.tasks[0])
    assert learner.method.param_groups(learner) == {}
    lab.descend(learner, stream.tasks[0])
    lab.close(learner, stream.tasks[0])
    learner.grow(stream.tasks[1])
    assert learner.method.param_groups(learner) == {"method.tokens.vision.values": 0.1}


def test_prompts_are_pulled_to_their_last_values(lab: Any) -> None:
    learner, stream, _ = begun(lab, "fm_lora(rank=4, prompts=2)", tasks=0)
    for task in stream:
        learner.grow(task)
        lab.descend(learner, task, steps=1)
        last = learner.method.tokens["vision"].values.detach().clone()
        lab.close(learner, task)
        assert learner.method.penalty(learner, {}, torch.empty(0)) == 0
        learner.method.tokens["vision"].values.data += 0.5
        found = learner.method.penalty(learner, {}, torch.empty(0))
        assert found.item() == pytest.approx(0.01 * 0.25 * 2 * 16, rel=1e-5)
        learner.method.tokens["vision"].values.data.copy_(last)


# Export


# Refusals


def test_a_number_of_tokens_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^m=0: expected at least 1 prompt token$"):
        PromptTokens(0, 16)


def test_bases_stand_in_the_tower_that_was_asked_for() -> None:
    learner = Core(tiny(dim=16, text=True), make_objective("zeroshot"), make_method("fm_lora(rank=4, tower='text')"))
    learner.grow(Task(0, "one", (0, 1), ("cat", "dog")))
    assert {site.layer.split(".")[0] for site, _, _ in updates(learner.backbone)} == {"text"}
    assert prompted(learner.backbone.text)
    assert not prompted(learner.backbone.vision)


def test_bases_of_rank_1_leave_nothing_to_choose(lab: Any) -> None:
    learner, _, _ = begun(lab, "fm_lora(rank=1)", tasks=2)
    assert learner.method.measures(learner) == {"rank": 1}
