"""What comes from a browser: limited in size, checked like all input, and written below one folder only."""

import json
import re
import secrets
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from PIL import Image

from perdure.app.waiting import NAMED, UPLOAD, Held, WaitingLesson
from perdure.backbones.preprocess import decode, is_image
from perdure.formatting import human_bytes, shortened
from perdure.streams.naming import class_name

_CHUNK = 1 << 20
_TABLES = (".json", ".jsonl", ".csv", ".parquet")
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
_ENCODINGS = ("utf-8", "gb18030")
"""Of names in archives that do not say theirs: as macOS writes them, and Windows in Chinese."""
_LONGEST = 120  # characters of a name that is shown
_BYTES, _ENDING = 200, 16  # of a name that is written
_FORBIDDEN = '<>:"/\\|?*'


@dataclass(frozen=True)
class Limits:
    """How much may be uploaded."""

    upload: int = 200_000_000
    """Bytes of one request."""
    unpacked: int = 2_000_000_000
    """Bytes of all that an archive holds."""
    files: int = 20_000
    """Files in an archive."""
    pictures: int = 64
    """Pictures of one question."""


def looked_at(files: Sequence[tuple[str, bytes | Path]], limits: Limits) -> list[Image.Image]:
    """Uploaded pictures, decoded.

    Args:
        files: what each is called, and its bytes or where they lie.
        limits: how many are allowed.

    Raises:
        ValueError: when there are none or too many, or one is no picture.
    """
    if not files:
        raise ValueError("there is no picture: give one or several")
    if len(files) > limits.pictures:
        raise ValueError(f"{len(files)} pictures at once: give at most {limits.pictures}")
    return [decode(content, _title(name)) for name, content in files]


class Store:
    """The folder in which uploads that are taught are kept, so that they can be measured and replayed later.

    Args:
        root: made when something is kept.
        limits: of what is unpacked.
    """

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root, self.limits = root, limits
        self._held = Held()

    def classes(self, pictures: Sequence[tuple[str, Sequence[tuple[str, bytes | Path]]]]) -> Path:
        """Pictures as a folder of class folders: what each class is called, and its files."""
        if not pictures:
            raise ValueError("there is nothing to learn: give pictures and what they show")
        names = [class_name(name, "class name") for name, _ in pictures]
        with self._new(", ".join(dict.fromkeys(names))) as folder:
            made: set[tuple[str, ...]] = set()
            for name, (_, files) in zip(names, pictures, strict=True):
                within = folder / _whole(name, "class name")
                _refuse_another(within, (name,), made)
                within.mkdir(exist_ok=True)
                _write(within, files)
            return folder

    def captioned(self, files: Sequence[tuple[str, bytes | Path]], lines: str) -> Path:
        """Pictures with a caption each, a line a picture; returns the JSONL file."""
        texts = _each(files, lines, "captions")
        return self._table("captions", files, [{"captions": [text]} for text in texts])

    def asked(self, files: Sequence[tuple[str, bytes | Path]], lines: str) -> Path:
        """Pictures with a question and its answer each, a line a picture, as `What is it? | A cat`."""
        rows: list[dict[str, object]] = []
        for text in _each(files, lines, "questions"):
            question, bar, answer = (part.strip() for part in text.partition("|"))
            if not (bar and question and answer):
                raise ValueError(f"{shortened(text)!r} is no question with its answer: write 'What is it? | A cat'")
            rows.append({"question": question, "answer": answer})
        return self._table("questions", files, rows)

    def archive(self, name: str, content: Path, tables: bool = True) -> Path:
        """What a zip archive holds: a folder of class folders, or the one table in it.

        Args:
            name: what it is called.
            content: where it lies.
            tables: whether one is learnt from; a learner of classes leaves out those that lie beside its folders.

        Raises:
            ValueError: for what is no archive, is too large, or would be written elsewhere.
        """
        title = class_name(PurePosixPath(_title(name)).stem or "photos", "archive")
        with self._new(title) as folder:
            try:
                with zipfile.ZipFile(content) as opened:
                    self._unpack(opened, folder, tables)
            except _DAMAGE as error:
                raise ValueError(
                    f"{_title(name)} cannot be unpacked ({' '.join(str(error).split())}): give a zip archive without a "
                    "password"
                ) from error
            return _inner(folder, tables)

    def upload_of(self, place: str | Path) -> Path | None:
        """The folder of the upload that `place` lies in; None where it is none of this store's."""
        root, place = self.root.resolve(), Path(place).resolve()
        names = place.relative_to(root).parts if root in place.parents else ("",)
        return root / names[0] if UPLOAD.fullmatch(names[0]) else None

    def unplaced(self, text: str) -> str:
        """A text in which uploads have the names that they were given, and not where they lie."""
        # the longest first: the others may be a part of it
        for root in sorted({str(self.root), str(self.root.absolute()), str(self.root.resolve())}, key=len)[::-1]:
            text = re.sub(rf"{re.escape(root)}[/\\]{UPLOAD.pattern}[/\\]", "", text)
        return text

    def note(self, lesson: WaitingLesson) -> None:
        """Write down what is to be done with the upload that a lesson is from; nothing where it is none of these."""
        if upload := self.upload_of(lesson.where):
            with _refusing():
                self._held.note(upload, lesson)

    def left(self, learner: Path, kept: Iterable[str] = ()) -> list[WaitingLesson]:
        """The lessons for `learner` that an app which is no more has left; what it had begun to write is removed."""
        lessons, parts = self._held.left(self.root, learner)
        for upload in parts:
            self.drop(upload / "pictures", kept)
        return lessons

    def drop(self, place: Path, kept: Iterable[str] = ()) -> None:
        """Remove the upload that `place` lies in, unless something that is to be `kept` lies there too.

        Nothing more is done with it, in either case.
        """
        upload = self.upload_of(place)
        if upload is None:
            return
        if upload in map(self.upload_of, kept):
            self._held.leave(upload)
        else:
            self._held.remove(upload)

    def _unpack(self, opened: zipfile.ZipFile, folder: Path, tables: bool) -> None:
        entries, left = opened.infolist(), self.limits.unpacked
        if len(entries) > self.limits.files:
            raise ValueError(f"the archive holds {len(entries)} files: give at most {self.limits.files}")
        wanted = [(entry, parts) for entry in entries if (parts := _parts_of(entry, tables)) is not None]
        if not wanted:
            nothing = "no picture and no table" if tables else "no picture"
            raise ValueError(f"the archive holds {nothing}: give a folder for each class, with its images")
        made: set[tuple[str, ...]] = set()
        for entry, (*outer, last) in wanted:
            within = folder
            for number, part in enumerate(outer, 1):
                within /= _whole(part, "the archive's folder")
                _refuse_another(within, outer[:number], made)
            path = within.relative_to(folder) / _safe(last, "the archive's")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                raise ValueError(f"the archive holds {str(path)!r:.80} twice, or names that are too long: rename them")
            with opened.open(entry) as packed, target.open("xb") as file:
                # counted as it comes: what an archive says of its sizes need not be true
                while chunk := packed.read(min(_CHUNK, left + 1)):
                    left -= len(chunk)
                    if left < 0:
                        most = human_bytes(self.limits.unpacked)
                        raise ValueError(f"the archive holds more than {most}: give a smaller one")
                    file.write(chunk)

    def _table(self, name: str, files: Sequence[tuple[str, bytes | Path]], rows: Sequence[dict[str, object]]) -> Path:
        with self._new(name) as folder:
            written = _write(folder, files)
            table = folder / f"{name}.jsonl"
            lines = [{"image": image.name} | row for image, row in zip(written, rows, strict=True)]
            table.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
            return table

    @contextmanager
    def _new(self, title: str) -> Iterator[Path]:
        """A folder of its own, which is gone again where what is written to it turns out to be of no use."""
        outer = self.root / secrets.token_hex(NAMED)
        folder = outer / _safe(title, "name")
        try:
            with _refusing():
                folder.mkdir(parents=True)
                self._held.begin(outer.resolve())
                yield folder
        except BaseException:
            self.drop(folder)
            raise


@contextmanager
def _refusing() -> Iterator[None]:
    """An upload that cannot be written is refused as one that is wrong."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"the upload cannot be written here: {error.strerror or error}") from error


def _parts_of(entry: zipfile.ZipInfo, tables: bool) -> tuple[str, ...] | None:
    """The names of an entry's folders and its own; None for what is left out.

    Raises:
        ValueError: for what would be written elsewhere, or is a link.
    """
    name = _named(entry)
    path = PurePosixPath(name.replace("\\", "/"))
    kind = stat.S_IFMT(entry.external_attr >> 16)
    outside = path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts
    if outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(
            f"the archive holds {shortened(name)!r}, which leads out of it: pack pictures and folders only"
        )
    if entry.is_dir() or any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return None
    return path.parts if is_image(path.name) or (tables and path.suffix.lower() in _TABLES) else None


def _named(entry: zipfile.ZipInfo) -> str:
    if entry.flag_bits & 0x800 or entry.filename.isascii():
        return entry.filename
    for encoding in _ENCODINGS:
        try:
            return entry.filename.encode("cp437").decode(encoding)
        except UnicodeError:
            continue
    return entry.filename


def _inner(folder: Path, tables: bool) -> Path:
    """The one table in a folder, or the folder below folders that hold nothing but one of classes."""
    if tables and len(found := [path for path in folder.rglob("*") if path.suffix.lower() in _TABLES]) == 1:
        return found[0]
    while len(inner := [path for path in folder.iterdir() if path.is_dir()]) == 1:
        within = [path.is_dir() for path in inner[0].iterdir()]
        alone = len(list(folder.iterdir())) == 1 or (not tables and all(within))  # a cover may lie beside it
        if not (alone and any(within)):
            break
        folder = inner[0]
    return folder


def _write(folder: Path, files: Sequence[tuple[str, bytes | Path]]) -> list[Path]:
    """The files under numbers, each of them a picture."""
    if not files:
        raise ValueError(f"there is no picture of {folder.name!r}: give one or several")
    before, written = sum(1 for _ in folder.iterdir()), []
    for number, (name, content) in enumerate(files, before):
        decode(content, _title(name))
        suffix = PurePosixPath(_title(name)).suffix.lower()
        target = folder / f"{number:05d}{suffix if is_image(f'x{suffix}') else '.png'}"
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        written.append(target)
    return written


def _each(files: Sequence[object], lines: str, what: str) -> list[str]:
    texts = [line.strip() for line in lines.splitlines() if line.strip()]
    if len(texts) != len(files):
        raise ValueError(
            f"{what}: {len(texts)} lines for {len(files)} pictures: write one line for each, in their order"
        )
    return texts


def _title(name: str) -> str:
    """What a file was called where it came from, for messages: without its folders."""
    return shortened(PurePosixPath(name.replace("\\", "/")).name or "the upload", _LONGEST)


def _safe(name: str, what: str) -> str:
    """`name` as that of a file or folder, which leads nowhere.

    Raises:
        ValueError: when it cannot be one.
    """
    if name.startswith(".") or not name.isprintable() or any(character in _FORBIDDEN for character in name):
        raise ValueError(
            f"{what} {name!r:.80} cannot be a folder's name: leave out {_FORBIDDEN} and a dot at its start"
        )
    ending = PurePosixPath(name).suffix
    ending = ending if len(ending.encode()) <= _ENDING else ""
    stem = name.removesuffix(ending).encode()[: _BYTES - len(ending.encode())].decode(errors="ignore")
    return (stem + ending).rstrip(". ") or "_"


def _whole(name: str, what: str) -> str:
    """The same where the name stands for a class: it is not changed, but for blanks at its end.

    Raises:
        ValueError: when it would be.
    """
    safe = _safe(name, what)
    if safe != name.rstrip(" "):
        why = f"is longer than {_BYTES} bytes" if len(name.encode()) > _BYTES else "ends in a dot"
        raise ValueError(f"{what} {name!r:.80} {why}, and would be another name as a folder's: rename it")
    return safe


def _refuse_another(folder: Path, names: Sequence[str], made: set[tuple[str, ...]]) -> None:
    """Raise a ValueError where `folder` is there for other names than its `names`; those it was `made` for are kept.

    Systems differ in which names are one folder's: "Cat" and "cat" are for some.
    """
    same = tuple(class_name(name, "folder") for name in names)
    if same not in made and folder.exists():
        raise ValueError(f"{'/'.join(names)!r:.80} and another name are one folder here: rename one of the two")
    made.add(same)
