"""Paths in descriptions."""

from pathlib import Path

import pytest

from perdure.options.paths import anchored, moved, pathless, paths_in
from perdure.training.config import RunConfig


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "vit", "bert", "natural"):
        (tmp_path / name).mkdir()
    for name in ("order.txt", "w.safetensors"):
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    "text",
    [
        "images(path='{}photos', tasks=2)",
        "images(path='{}photos', order='{}order.txt')",
        "sequence(images(path='{}photos'), parquet(path='gone'))",
        "dual(vision='{}vit', text='{}bert')",
        "timm(name='vit_base', checkpoint='{}w.safetensors')",
        "timm(name='{}vit')",
        """captions(path='{}photos', embed="vision(path='{}vit')")""",
        "conversations(path=['{}photos', '{}vit'], images='{}photos')",
        "video_mme(path='{}photos', frames='{}vit')",
        """lora + zscl(reference="captions(path='{}photos')")""",
    ],
)
def test_every_path_that_leads_somewhere_is_recorded_absolute(text: str, tmp_path: Path) -> None:
    found = anchored(text.replace("{}", ""))
    wanted = text.replace("{}", f"{tmp_path}/")
    assert paths_in(found) == paths_in(wanted)
    assert anchored(found) == found
    assert paths_in(moved(found, [(str(tmp_path), "/new")])) == paths_in(text.replace("{}", "/new/"))
    assert pathless(found) == pathless(wanted)


@pytest.mark.parametrize(
    "text",
    [
        "clip(path='openai/clip')",
        "images(path='gone')",
        "images(path='x', order='natural')",
        "lora(",
        "a(path='a\\0b')",
    ],
)
def test_what_leads_nowhere_stays_as_it_was_written(text: str) -> None:
    assert anchored(text) == text


def test_a_move_takes_what_lies_within_and_not_what_is_called_alike() -> None:
    assert moved("images(path='/a/b')", [("/a/b", "/c")]) == "images(path='/c')"
    assert moved("images(path='/a/bc')", [("/a/b", "/c")]) == "images(path='/a/bc')"
    assert moved("images(path='/a/b')", [("/a", "/x"), ("/x/b", "/y")]) == "images(path='/y')"


def test_a_configuration_holds_absolute_paths(tmp_path: Path) -> None:
    made = RunConfig(stream="images(path='photos')", backbone="vision(path='vit')", retain=("images(path='photos')",))
    place = f"{str(tmp_path / 'photos')!r}"
    assert made.stream == f"images(path={place})"
    assert made.retain == (f"images(path={place})",)
    assert str(tmp_path / "vit") in made.backbone
