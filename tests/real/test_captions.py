"""Streams of real images with captions."""

from pathlib import Path

import pytest

from perdure.backbones.preprocess import Preprocess
from perdure.streams import build_stream

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "flickr8k"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data set is not there: {DATA}")


@needs_data
def test_flickr8k_has_five_english_captions_an_image_but_two_that_stand_twice() -> None:
    text = f"captions(path={str(DATA)!r}, captions='captions_en', by='random')"
    stream = build_stream(text, Preprocess(48, 48), 0)
    assert stream.notes["train_images"] == [400] * 5
    assert stream.notes["test_images"] == [200] * 5
    assert {side: sum(each) for side, each in stream.notes["captions"].items()} == {"train": 9999, "test": 4999}
    assert stream.notes["remarks"] == ["2 captions stand twice at the same image: each text of an image counts once"]
    batch = stream.tasks[0].test.__getitems__(range(64))
    assert 60 < batch["image"].float().mean() < 190
    assert all(len(line) > 3 and line.isascii() for line in [line for each in batch["text"] for line in each])


@needs_data
def test_flickr8k_is_english_first_then_chinese() -> None:
    text = f"captions(path={str(DATA)!r}, captions=('captions_en', 'captions_zh'))"
    stream = build_stream(text, Preprocess(48, 48), 3)
    english, chinese = stream
    assert stream.notes["train_images"] == [2000, 2000]
    assert english.train.pairs.tolist() == chinese.train.pairs.tolist()
    line = chinese.train.texts[0][0]
    assert any("\u4e00" <= letter <= "\u9fff" for letter in line)


@needs_data
def test_flickr8k_falls_into_clusters_of_reasonable_sizes() -> None:
    text = f"captions(path={str(DATA)!r}, captions='captions_en', embed='tiny(size=32)')"
    stream = build_stream(text, Preprocess(48, 48), 0)
    assert sum(stream.notes["train_images"]) == 2000
    assert min(stream.notes["train_images"]) >= 100
    assert min(stream.notes["test_images"]) >= 50
