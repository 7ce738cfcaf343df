"""Texts as tensors."""

import pytest
import torch

from perdure.backbones.texts import pack_texts, present, unpack_texts


def test_texts_of_any_language_come_back() -> None:
    texts = [["two dogs", "两只狗在海滩上"], ["één hond 🐕"], []]
    packed = pack_texts(texts)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 2, len("两只狗在海滩上".encode()))
    assert present(packed).tolist() == [[True, True], [True, False], [False, False]]
    assert unpack_texts(packed[0]) == texts[0]
    assert unpack_texts(packed.flatten(0, 1)) == ["two dogs", "两只狗在海滩上", "één hond 🐕", "", "", ""]


def test_nothing_is_packed_into_nothing() -> None:
    assert pack_texts([]).shape == (0, 0, 0)
    assert present(pack_texts([[], []])).shape == (2, 0)
    assert present(torch.zeros(2, 3, 0, dtype=torch.uint8)).tolist() == [[False] * 3] * 2


def test_a_text_that_could_not_be_read_back_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^text .* holds a zero character: remove it$"):
        pack_texts([["fine", "a\0b"]])
