"""Constant blocks at the bottom of the tower are computed once per image."""

import pytest
import torch

from perdure.core.caching import Cache
from perdure.core.learner import Core
from perdure.streams import build_stream
from perdure.training.config import make_backbone, make_method, make_objective
from perdure.training.loop import TrainConfig, fit_task

BACKBONES = ["tiny(depth=3)", "tiny(depth=3, fused=False)"]


def learner(backbone: str, method: str) -> Core:
    core = Core(make_backbone(backbone), make_objective("classify()"), make_method(method))
    core.grow(build_stream("synthetic(tasks=2)", core.backbone.preprocess, 0).tasks[0])
    return core


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("blocks", "constant"), [("0-2", 0), ("1-2", 1), ("2", 2)])
def test_features_from_a_kept_state_equal_those_from_the_image(backbone: str, blocks: str, constant: int) -> None:
    core = learner(backbone, f"lora(blocks={blocks!r})")
    assert core.constant_blocks == constant
    for adapter in core.method.adapters:
        torch.nn.init.normal_(adapter.up[0], std=0.1)
    data = core.task.train
    plain = data.__getitems__(range(8))
    kept = core.cache.lower_blocks(data).__getitems__(range(8))
    assert ("lower_blocks" in kept) == (constant > 0)
    torch.testing.assert_close(core.encode(kept), core.encode(plain), rtol=0, atol=0)


def test_blocks_below_the_entry_are_not_computed_and_come_back() -> None:
    core = learner("tiny(depth=3)", "lora(blocks='2')")
    kept = core.cache.lower_blocks(core.task.train).__getitems__([0, 1])
    called: list[int] = []
    for number, name in enumerate(core.backbone.blocks()):
        inner = core.backbone.get_submodule(name).get_submodule("norm1")
        inner.register_forward_hook(lambda *_, number=number: called.append(number))
    core.encode(kept)
    assert called == [2]
    core.encode({"image": kept["image"]})
    assert called == [2, 0, 1, 2]


@pytest.mark.parametrize("method", ["lora(blocks='1')", "inflora(rank=4, blocks='1')"])
def test_training_on_kept_states_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(epochs=2, batch_size=16, lr=1e-2)
    with_kept, without = learner("tiny()", method), learner("tiny()", method)
    fit_task(with_kept, with_kept.task, config)
    monkeypatch.setattr(Cache, "lower_blocks", lambda _cache, data: data)
    fit_task(without, without.task, config)
    for name, value in with_kept.learnt_state().items():
        torch.testing.assert_close(value, without.learnt_state()[name], rtol=0, atol=0, msg=name)


def test_replayed_examples_get_their_state_too() -> None:
    core = learner("tiny(depth=3)", "lora(blocks='2') + replay(size=8)")
    fit_task(core, core.task, TrainConfig(epochs=2, batch_size=16))
    batch = core.cache.lower_blocks(core.task.train).__getitems__(range(4))
    mixed = core.method.batch(core, batch)
    assert mixed["lower_blocks"].shape[0] == 8
    torch.testing.assert_close(core.encode(mixed), core.encode({"image": mixed["image"]}), rtol=1e-6, atol=1e-6)
