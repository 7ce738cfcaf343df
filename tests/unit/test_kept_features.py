"""Features kept in memory and on disk: nothing is computed twice, nothing changes, and a folder is never believed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.backbones import image_features
from perdure.backbones.mllm import mllm
from perdure.core.cached_data import InPieces, Seen
from perdure.core.caching import Cache
from perdure.core.feature_store import FeatureStore, key_of
from perdure.core.learner import Core
from perdure.objectives.generate import Generate
from perdure.streams import build_stream
from perdure.training.config import make_method
from perdure.training.run import run
from perdure.types import Encoded, Subset

METHODS = ["probe", "ranpac", "lora(rank=2, blocks='1')", "lora(rank=2, blocks='1') + replay(size=4)"]


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were encoded, or how far, since then."""
    counted: list[int] = []
    inner = Cache._stored

    def stored(self: Cache, kind: str, batch: Any, compute: Callable[[Any], Tensor]) -> Tensor:
        def computing(batch: Any) -> Tensor:
            counted.append(len(batch["label"]))
            return compute(batch)

        return inner(self, kind, batch, computing)

    monkeypatch.setattr(Cache, "_stored", stored)
    return counted


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_changes_no_bit_and_spares_the_second_run_all_that_is_frozen(
    method: str, lab: Any, content_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, cache = counting(monkeypatch), str(tmp_path / "cache")
    lab.run(method, tmp_path / "without")
    without = sum(counted)
    counted.clear()
    for name in ("first", "second"):
        lab.run(method, tmp_path / name, cache=cache)
    assert content_of(tmp_path / "first") == content_of(tmp_path / "without") == content_of(tmp_path / "second")
    assert sum(counted) == without > 0  # all by the first of the two
    assert entries(tmp_path / "cache")


def test_what_fits_into_memory_no_more_is_read_from_the_folder(
    lab: Any, content_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, read = "lora(rank=2, blocks='1')", []
    lab.run(method, tmp_path / "without")
    monkeypatch.setattr("perdure.core.caching._MOST_KEPT", 0)
    monkeypatch.setattr("perdure.core.caching._TOGETHER", 5)
    inner = InPieces.__getitems__
    monkeypatch.setattr(InPieces, "__getitems__", lambda self, at: read.append(len(at)) or inner(self, at))
    lab.run(method, tmp_path / "with", cache=str(tmp_path / "cache"))
    with_folder, without = content_of(tmp_path / "with"), content_of(tmp_path / "without")
    assert with_folder["results"] == without["results"]
    assert sum(read) == 3 * 2 * 16  # tasks, epochs, images


def test_other_weights_precisions_and_pixels_have_other_keys() -> None:
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    keys = [
        key_of("features", "weights", image),
        key_of("features", "others", image),
        key_of("lower_blocks", "weights", image),
        key_of("features", "weights", image + 1),
        key_of("features", "weights", image.reshape(3, 1, 2, 2)),
        key_of("features", "weights", image.to(torch.int8)),
        key_of("featuresweights", "", image),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    store, value = FeatureStore(tmp_path, 10**6), torch.randn(3, 2, 5).to(dtype)
    assert store.get(key_of("a")) is None
    store.put(key_of("a"), value)
    found = FeatureStore(tmp_path, 10**6).get(key_of("a"), 3)
    assert found is not None
    assert torch.equal(found, value)
    assert found.dtype == dtype


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def changed(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def renamed(path: Path) -> None:
    other = path.with_name(path.name)
    FeatureStore(path.parent.parent, 10**6).put(key_of("b"), torch.zeros(3))
    next(p for p in entries(path.parent.parent) if p != path).replace(other)


@pytest.mark.parametrize("damage", [cut, emptied, changed, renamed, lambda path: path.write_bytes(b"\x00" * 100)])
def test_a_damaged_entry_is_removed_and_computed_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    store, key = FeatureStore(tmp_path, 10**6), key_of("a")
    store.put(key, torch.ones(3))
    damage(entries(tmp_path)[0])
    assert store.get(key, 3) is None
    assert key not in {path.stem for path in entries(tmp_path)}


def test_an_entry_of_other_rows_is_no_answer(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, 10**6)
    store.put(key_of("a"), torch.ones(3))
    assert store.get(key_of("a"), 4) is None


def test_entries_not_read_for_longest_go_first_and_the_budget_holds(tmp_path: Path) -> None:
    FeatureStore(tmp_path, 10**6).put(key_of("0"), torch.zeros(250))
    size = entries(tmp_path)[0].stat().st_size
    store = FeatureStore(tmp_path, int(4.7 * size))
    for number in range(4):
        key = key_of(str(number))
        store.put(key, torch.zeros(250))
        os.utime(tmp_path / key[:2] / f"{key}.safetensors", (number, number))
    assert store.get(key_of("0")) is not None  # now it was read last
    store.put(key_of("4"), torch.zeros(250))
    assert [store.get(key_of(str(n))) is not None for n in range(5)] == [True, False, True, True, True]
    store.put(key_of("large"), torch.zeros(5000))
    assert store.get(key_of("large")) is None


WRITING = """
import sys, torch
from pathlib import Path
from perdure.core.feature_store import FeatureStore, key_of
store = FeatureStore(Path(sys.argv[1]), 10**9)
print("ready", flush=True)
for number in range(10**6):
    store.put(key_of(str(number)), torch.full((200_000,), float(number)))
"""


def test_a_writer_that_is_killed_leaves_no_half_entry(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITING, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        while len(entries(tmp_path)) < 5:
            pass
        writer.send_signal(signal.SIGKILL)
    store, whole = FeatureStore(tmp_path, 10**9), len(entries(tmp_path))
    found = [store.get(key_of(str(number)), 200_000) for number in range(whole)]
    assert all(each is not None and bool((each == n).all()) for n, each in enumerate(found))
    for draft in tmp_path.glob("*/*.draft"):
        os.utime(draft, (0, 0))
    store.put(key_of("more"), torch.ones(1))
    assert not list(tmp_path.glob("*/*.draft"))


def test_a_folder_that_nothing_is_kept_in_is_told_of(lab: Any, tmp_path: Path) -> None:
    from perdure.training.loop import Quiet

    notes: list[str] = []
    progress = Quiet()
    progress.note = notes.append  # type: ignore[method-assign]
    run(lab.config("finetune", cache=str(tmp_path / "cache")), tmp_path / "run", progress)
    assert any("had no effect" in note for note in notes)


def test_a_number_of_bytes_without_a_folder_is_refused(lab: Any) -> None:
    with pytest.raises(ValueError, match=r"cache_bytes=.* has no effect without cache"):
        lab.config("probe", cache_bytes=1e6)


QUESTIONS = "conversations(path={folder!r})"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> str:
    from PIL import Image

    folder = tmp_path_factory.mktemp("questions")
    for task in ("a", "b"):
        for part in ("train", "test"):
            rows = []
            for i in range(5):
                names = [f"{task}{part}{i // 2}.png", f"{part}.png"][: (1, 1, 2, 0, 1)[i]]
                for name in names:
                    Image.new("RGB", (28, 28), (len(name) * 9 % 255, 40 * i, 90)).save(folder / name)
                value = "<image>\n" * len(names) + f"What is it{'?' * (i + 1)}"
                turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "red" if i % 2 else "blue one"}]
                rows.append({"id": i, "image": names, "conversations": turns})
            (folder / f"{task}.{part}.json").write_text(json.dumps(rows))
    return QUESTIONS.format(folder=str(folder))


FAMILIES = ["llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_seen_once_gives_the_rows_and_answers_of_images(
    family: str, tiny_mllms: Callable[[str], Path], questions: str
) -> None:
    backbone = mllm(str(tiny_mllms(family)))
    assert backbone.sees_once()
    data = build_stream(questions, backbone.preprocess, 0).tasks[0].train
    batch = backbone.prepare(data.__getitems__(range(5)))
    blind = batch | {"tokens": [backbone.see(each) for each in batch["tokens"]]}
    assert not any(image_features.has_images(each) for each in blind["tokens"])
    mixed = batch | {"tokens": [*blind["tokens"][:1], *batch["tokens"][1:]]}
    with torch.no_grad():
        rows = backbone(batch)
        for other in (blind, mixed):
            torch.testing.assert_close(backbone(other), rows, rtol=1e-5, atol=1e-5)
            assert backbone.generate(other, 4) == backbone.generate(batch, 4)
        pooled = zip(backbone.pooled(blind), backbone.pooled(batch), strict=True)
        for mine, plain in pooled:
            torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


MLLM = ["lora(rank=2, tower='language')", "lora(rank=2, tower='language') + replay(size=4)", "lora_experts(rank=2)"]


@pytest.mark.parametrize("method", [*MLLM, "probe"])
def test_images_of_a_frozen_tower_are_looked_at_once_and_on_disk_alike(
    method: str, lab: Any, content_of: Any, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    inner = image_features.seen_of
    monkeypatch.setattr("perdure.backbones.image_features.seen_of", lambda *args: looked.append(1) or inner(*args))
    options = {
        "stream": questions,
        "backbone": "tiny_mllm()",
        "objective": "generate(tokens=4)",
        "batch_size": 2,
        "epochs": 6,
        "lr": 2e-2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perdure.core.caching._MOST_KEPT", 0)
        unkept = lab.run(method, tmp_path / "unkept", **options)
    looked.clear()
    kept = lab.run(method, tmp_path / "without", **options)
    assert {name: kept[name] for name in ("matrix", "lenient_matrix")} == {
        name: unkept[name] for name in ("matrix", "lenient_matrix")
    }
    without = len(looked)
    lab.run(method, tmp_path / "first", **options, cache=str(tmp_path / "cache"))
    looked.clear()
    lab.run(method, tmp_path / "second", **options, cache=str(tmp_path / "cache"))
    assert without
    assert len(looked) <= 2  # to try whether it can be done, with the untaught model and with the learner
    assert content_of(tmp_path / "first") == content_of(tmp_path / "without") == content_of(tmp_path / "second")


def test_a_tower_that_learns_looks_at_its_images_in_every_step(questions: str) -> None:
    for method in (
        "lora(rank=2, tower='vision')",
        "lora(rank=2, tower='projector', at='mlp')",
        "finetune(tower='vision')",
    ):
        learner, data = learner_of(method, questions)
        kept = learner.cache.of(data, 2)
        assert isinstance(kept, Seen)
        plain, batch = (next(learner.batches(each, 5)) for each in (data, kept))
        assert all(each.seen is None for each in batch["tokens"])
        assert torch.equal(learner.encode(batch), learner.encode(plain))


def learner_of(method: str, questions: str) -> tuple[Core, Any]:
    from perdure.backbones.tiny_mllm import tiny_mllm

    learner = Core(tiny_mllm(), Generate(tokens=4), make_method(method), "domain")
    task = build_stream(questions, learner.backbone.preprocess, 0).tasks[0]
    learner.grow(task)
    return learner, task.train


def test_an_entry_that_is_gone_is_looked_at_again(questions: str, tmp_path: Path) -> None:
    learner, data = learner_of(MLLM[0], questions)
    learner.store = FeatureStore(tmp_path, 10**9)
    kept = learner.cache.of(data, 2)
    assert isinstance(kept, Seen)
    batch = next(learner.batches(kept, 5))
    rows = learner.encode(batch)
    for path in entries(tmp_path)[:2]:
        path.unlink()
    torch.testing.assert_close(learner.encode(next(learner.batches(kept, 5))), rows, rtol=1e-5, atol=1e-5)


def test_what_is_known_already_stays_known_through_parts_and_facts_of_it(questions: str) -> None:
    learner, data = learner_of(MLLM[0], questions)
    seen = learner.cache.test(data)
    for again in (seen, Subset(seen, torch.tensor([0, 2, 4])), Encoded({"fact": torch.ones(5)}, seen.labels, seen)):
        known = next(learner.batches(learner.cache.test(again), 5))["tokens"]
        plain = next(learner.batches(again, 5))["tokens"]
        assert [each.seen is None for each in known] == [each.seen is None for each in plain]
        assert any(each.seen is not None for each in known)


def test_what_takes_more_than_its_room_is_not_kept(questions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, data = learner_of(MLLM[0], questions)
    assert isinstance(learner.cache.seen(data), Seen)
    assert learner.cache.seen(data, 1000) is data


@pytest.mark.parametrize("place", ["a file", "a file/inside", "/proc/nowhere"])
def test_a_cache_that_cannot_be_is_refused_before_a_run_is_begun(place: str, lab: Any, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(ValueError, match=f"--cache {tmp_path / place}: .*: give a folder, or leave it out"):
        lab.run("ncm", tmp_path / "run", cache=str(tmp_path / place))
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_stands_in_the_way_of_an_entry_is_named(tmp_path: Path) -> None:
    key = key_of("a")
    store, path = FeatureStore(tmp_path, 10**6), tmp_path / key[:2] / f"{key}.safetensors"
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"--cache .*{key}.safetensors: .*: remove it, or give another folder"):
        store.get(key)
    path.rmdir(), path.parent.rmdir()
    path.parent.write_text("a file where the cache makes a folder")
    with pytest.raises(ValueError, match=rf"--cache .*/{key[:2]}: .*: remove it, or give another folder"):
        store.put(key, torch.zeros(3))
