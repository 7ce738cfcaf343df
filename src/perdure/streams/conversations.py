"""Conversations about images as examples: what is asked, what is right, and the images, decoded once a batch.

A batch holds them under "conversation", one `Conversation` an example. Where tasks and files come from is not known
here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from perdure.backbones.preprocess import UnreadableImage
from perdure.scoring import Reference, score_of
from perdure.streams.image_set import Budget, content_hashes
from perdure.streams.sources import Source
from perdure.types import Batch

Role = Literal["system", "user", "assistant"]
Turn = tuple[Role, tuple[str | None, ...]]
"""Who speaks, and the parts of what is said: texts, and None where an image stands."""
Message = Mapping[str, Any]
"""A turn as chat templates want it: {"role": ..., "content": [{"type": "image"}, {"type": "text", "text": ...}]}."""

_THREADS = 4


@dataclass(frozen=True)
class Conversation(Mapping[str, Any]):
    """One example: what was said, and what the answer should be. Also a mapping of its fields, by their names.

    Args:
        messages: what stands before the answer, in the form of chat templates; the last one is the user's.
        images: in the order of their parts in `messages`; whatever Pillow reads, in a batch decoded ones.
        answer: the right one, or several, of which the first is the one to teach; none where it is only asked.
        options: what there is to choose from, without letters; None where the question is open.
        score: how answers are scored; "" leaves it to the objective.
        kind: the data's own sort of question, which some official scores look at.
        where: file and line, for messages to people.
        names: what the images are called in the data, which some official scores look at.
        categories: of a question of an evaluation set, by which its answers are counted.

    Raises:
        ValueError: when turns do not alternate, or images and their parts differ in number.
    """

    messages: Sequence[Message]
    images: Sequence[Any] = ()
    answer: str | Sequence[str] = ()
    options: Sequence[str] | None = None
    score: str = ""
    kind: str = ""
    where: str = ""
    names: Sequence[str] = ()
    categories: Sequence[str] = ()

    def __post_init__(self) -> None:
        turns = [(each["role"], tuple(part.get("text") for part in each["content"])) for each in self.messages]
        check_turns(turns, len(self.images))

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (each.name for each in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers."""
        return (self.answer,) if isinstance(self.answer, str) else tuple(self.answer)

    @property
    def taught(self) -> str:
        """The answer to teach; raises a ValueError where there is none."""
        if not self.answers:
            raise ValueError(f"{self.where or 'a conversation'}: no answer to teach; give one")
        return self.answers[0]

    @property
    def question(self) -> str:
        """The text of the last turn."""
        return "\n".join(part["text"] for part in self.messages[-1]["content"] if part["type"] == "text")

    @property
    def reference(self) -> Reference:
        """What an answer is compared with."""
        options = () if self.options is None else tuple(self.options)
        image = next(iter(self.names), "")
        return Reference(self.answers, options, self.question, image, self.kind, tuple(self.categories))


def check_turns(turns: Sequence[Turn], images: int) -> None:
    """Raise a ValueError unless what stands before an answer can be: the order of turns, and the number of images."""
    spoken = [role for role, _ in turns[1 if turns and turns[0][0] == "system" else 0 :]]
    for number, role in enumerate(spoken):
        due = "assistant" if number % 2 else "user"
        if role != due:
            said = f"after one of the {spoken[number - 1]}" if number else "at the beginning"
            raise ValueError(f"a turn of the {role} {said}: turns of user and assistant alternate, the user begins")
    if len(spoken) % 2 == 0:
        raise ValueError("the last turn is not the user's: end with a question and its answer")
    for role, parts in turns:
        if role != "user" and None in parts:
            raise ValueError(f"an image in a turn of the {role}: only the user shows images")
        if not parts or not all(part is None or part.strip() for part in parts):
            raise ValueError(f"a turn of the {role} says nothing; write something, or remove it")
    marks = sum(part is None for _, parts in turns for part in parts)
    if marks != images:
        raise ValueError(f"{marks} <image> mark(s) for {images} image(s): write as many marks as there are images")


def messages(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """Turns as chat templates want them."""

    def part(text: str | None) -> dict[str, str]:
        return {"type": "image"} if text is None else {"type": "text", "text": text}

    return tuple({"role": role, "content": [part(text) for text in content]} for role, content in turns)


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation as it was read: `images` are numbers in `Pictures`, `topic` says of which task it is.

    `key` names it wherever the data lies.
    """

    turns: tuple[Turn, ...]
    images: tuple[int, ...]
    answers: tuple[str, ...]
    where: str
    key: str
    options: tuple[str, ...] | None = None
    kind: str = ""
    topic: str = ""


class Pictures:
    """The images of a stream, each once, however many questions are about it.

    Decoded ones stay in memory as far as the budget goes; of the others, each is decoded once a batch.

    Args:
        budget: bytes that decoded images may take; one of its own when None.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.keys: list[str] = []
        """What identifies each image wherever the data lies; two folders may use the same."""
        self.identities: list[str] = []
        """What tells images apart here: the whole path, or the content."""
        self._places: list[tuple[Source, int]] = []
        self._numbers: dict[str, int] = {}
        self._decoded: dict[int, Image.Image] = {}
        self.budget = budget or Budget()

    def number(self, identity: str, place: Callable[[], tuple[Source, int]], key: str) -> int:
        """The number of an image; a new one, at `place`, where nothing else had this identity."""
        if identity not in self._numbers:
            self._places.append(place())
            self.keys.append(key)
            self.identities.append(identity)
            self._numbers[identity] = len(self.keys) - 1
        return self._numbers[identity]

    def read(self, numbers: Sequence[int]) -> dict[int, Image.Image]:
        """The images of these numbers, decoded; raises `UnreadableImage`."""
        return {number: self._read(number) for number in dict.fromkeys(numbers)}

    def hashes(self, numbers: Sequence[int]) -> Tensor:
        """What tells images apart by their content wherever they lie, int64 (n,); zero for one that is gone."""
        return content_hashes([self._places[number] for number in numbers])

    def unreadable(self, numbers: Sequence[int]) -> list[int]:
        """Which of them cannot be decoded; tries all."""

        def attempt(number: int) -> bool:
            try:
                self._read(number)
            except UnreadableImage:
                return False
            return True

        with ThreadPoolExecutor(_THREADS) as pool:
            return [number for number, fine in zip(numbers, pool.map(attempt, numbers), strict=True) if not fine]

    def _read(self, number: int) -> Image.Image:
        if (known := self._decoded.get(number)) is not None:
            return known
        source, row = self._places[number]
        image = source.read(row)
        # In a loader's workers memory would multiply.
        if get_worker_info() is None and self.budget.take(3 * image.width * image.height):
            self._decoded[number] = image
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_decoded", "budget")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _decoded={}, budget=Budget(0))


class ConversationSet:
    """Conversations of one task; implements `perdure.types.Data`.

    Args:
        records: as they were read.
        pictures: their images, shared by all sets of a stream.
        label: of the task, as each example's class.
        score: how answers are scored.
    """

    def __init__(self, records: Sequence[Record], pictures: Pictures, label: int = 0, score: str = "") -> None:
        self.records = tuple(records)
        self.pictures = pictures
        self.score = score
        self.labels = torch.full((len(records),), label, dtype=torch.int64)
        self.pairs = torch.tensor([_identity(pictures, each) for each in records], dtype=torch.int64)
        """What each example shows, int64 (n,): equal where two show the same images; so a memory counts them once."""
        self.skipped: tuple[str, ...] = ()
        """File and line of the conversations that `readable` left out."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """`label` int64 (B,), `pair` int64 (B,), and under "conversation" a list of B `Conversation`s.

        Raises:
            UnreadableImage: names the image's file or row, and the conversation's file and line.
        """
        chosen = torch.as_tensor(positions, dtype=torch.int64).flatten()
        records = [self.records[i] for i in chosen.tolist()]
        shown: dict[int, Image.Image] = {}
        for each in records:
            try:
                shown |= self.pictures.read([number for number in each.images if number not in shown])
            except UnreadableImage as error:
                raise UnreadableImage(f"{each.where}: {error}") from error
        examples = [self._example(each, [shown[number] for number in each.images]) for each in records]
        batch: dict[str, Any] = {"label": self.labels[chosen], "pair": self.pairs[chosen], "conversation": examples}
        return batch

    def _example(self, record: Record, images: Sequence[Any]) -> Conversation:
        return Conversation(
            messages(record.turns),
            tuple(images),
            record.answers[0] if len(record.answers) == 1 else record.answers,
            record.options,
            self.score,
            record.kind,
            record.where,
            tuple(self.pictures.keys[number] for number in record.images),
        )

    @property
    def frames(self) -> Tensor:
        """How many images each conversation shows, int64 (n,), and 1 for one without: what a memory counts of it."""
        return torch.tensor([max(1, len(set(each.images))) for each in self.records], dtype=torch.int64)

    def longest(self, count: int) -> list[int]:
        """Positions of the `count` conversations with the longest texts, of each number of images that there is."""
        sizes: dict[int, list[tuple[int, int]]] = {}
        for position, record in enumerate(self.records):
            text = sum(len(part.encode()) for _, parts in record.turns for part in parts if part is not None)
            sizes.setdefault(len(record.images), []).append((text, position))
        return [position for some in sizes.values() for _, position in sorted(some, reverse=True)[:count]]

    @property
    def offers_options(self) -> bool:
        """Whether there is something to choose from in a conversation."""
        return any(record.options for record in self.records)

    @property
    def offers_choices(self) -> bool:
        """Whether there is something to choose from in each conversation, what is right included."""
        try:
            self.check_score("choice")
        except ValueError:
            return False
        return all(record.options for record in self.records)

    def check_score(self, score: str = "", offered: bool = False) -> None:
        """Raise a ValueError, with file and line, for the first conversation of which a score cannot be asked.

        Args:
            score: its name; "" is its own, if any.
            offered: whether only conversations with options are looked at.
        """
        if not (name := score or self.score):
            return
        for record in self.records:
            if offered and not record.options:
                continue
            try:
                score_of(name).check(self._example(record, record.images).reference)
            except ValueError as error:
                raise ValueError(f"{record.where}: {error}") from error

    def where(self, position: int) -> str:
        """File and line of a conversation, for people."""
        return self.records[position].where

    def images(self) -> int:
        """How many different images the conversations show."""
        return len(self._numbers())

    def hashes(self) -> Tensor:
        """Of the content of each image that is shown, in any order: int64 (images,); zero for one that is gone."""
        return self.pictures.hashes(self._numbers())

    def shows(self, hashes: Tensor) -> Tensor:
        """Which conversations show an image of those hashes, bool (n,)."""
        known = dict(zip(self._numbers(), torch.isin(self.hashes(), hashes).tolist(), strict=True))
        return torch.tensor([any(known[i] for i in each.images) for each in self.records], dtype=torch.bool)

    def described(self, content: bool = False) -> list[str]:
        """All that is said in each conversation, as a text; images by their names, or by their content."""
        numbers = self._numbers()
        shown: list[Any] = self.hashes().tolist() if content else [self.pictures.keys[i] for i in numbers]
        name = dict(zip(numbers, shown, strict=True))
        return [repr((e.turns, [name[i] for i in e.images], e.answers, e.options, e.kind)) for e in self.records]

    def _numbers(self) -> list[int]:
        return sorted({number for each in self.records for number in each.images})

    def identities(self) -> set[str]:
        """What tells the images that are shown apart: the whole path, or a hash of the content."""
        return {self.pictures.identities[number] for number in self._numbers()}

    def subset(self, positions: Tensor) -> Self:
        """The conversations at `positions` (n,), in that order."""
        at = torch.as_tensor(positions, dtype=torch.int64)
        return self._of([self.records[i] for i in at.tolist()], self.labels[at], self.pairs[at])

    def relabelled(self, labels: Tensor) -> Self:
        """The same conversations under other labels, int64 (n,)."""
        if len(labels) != len(self):
            raise ValueError(f"labels: got {len(labels)} for {len(self)} conversations, expected one each")
        return self._of(self.records, labels, self.pairs)

    def readable(self) -> Self:
        """The conversations whose images can be decoded; decodes all, and lists the others as `skipped`."""
        bad = set(self.pictures.unreadable(self._numbers()))
        kept = [i for i, each in enumerate(self.records) if bad.isdisjoint(each.images)]
        good = self.subset(torch.tensor(kept, dtype=torch.int64))
        left_out = [each for each in self.records if not bad.isdisjoint(each.images)]
        good.skipped = (*self.skipped, *(each.where for each in left_out))
        return good

    def _of(self, records: Sequence[Record], labels: Tensor, pairs: Tensor) -> Self:
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, records=tuple(records), labels=labels, pairs=pairs)
        return made


def _identity(pictures: Pictures, record: Record) -> int:
    """A number for what a record shows, the same in other streams; for one without images, for what it says."""
    said = repr((record.turns, record.answers))
    shown = "\n".join(pictures.identities[number] for number in record.images) or said
    return int.from_bytes(sha256(shown.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1
