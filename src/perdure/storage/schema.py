"""The JSON files of a folder: what each holds, and how it is read: typed, sealed, or refused in one line.

A seal is the sha256 of what a file says, kept in the file itself: it tells what a disk or a hand has changed. Whether a
seal must be there is said by the format of `run.json`, which every manifest since then vouches for.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar, cast

import msgspec
from msgspec import Meta

FORMAT = 3
"""Of what is written now. 3 renamed tensors (`core.renamed_keys`); 2 has seals in all files, and manifests that name
their run and their predecessor; 1 had neither."""

SPECIALISTS = "specialists.json"
"""Of a folder that holds no learner, but says which others stand together."""

Natural = Annotated[int, Meta(ge=0, le=2**53)]
TaskNumber = Annotated[int, Meta(ge=0, le=1_000_000)]
T = TypeVar("T")


class Damaged(ValueError):
    """A file of a folder is not what it was when it was written."""


class TaskFacts(TypedDict):
    """A task's description, without its data."""

    index: TaskNumber
    name: str
    classes: list[Natural]
    names: list[str]
    total: NotRequired[TaskNumber | None]
    score: NotRequired[str]
    pretext: NotRequired[str]
    train: NotRequired[Natural]
    test: NotRequired[Natural]


class RowFacts(TypedDict):
    """A measurement: see `perdure.types.Row`."""

    after: Annotated[int, Meta(ge=-1, le=1_000_000)]
    on: TaskNumber | None
    metric: str
    value: float


class Line(RowFacts):
    """The same in results.jsonl, where others may have written that there is none."""

    value: float | None  # type: ignore[misc]


class Seconds(TypedDict):
    """Where the time of a task went."""

    prepare: float
    train: float
    finish: float
    evaluate: float


class LessonSource(TypedDict):
    """Where the images of a lesson were."""

    folder: str
    skip_bad: bool
    train_sha256: str
    skipped: NotRequired[list[str]]
    options: NotRequired[dict[str, int | float | str]]
    captions: NotRequired[str | None]
    images: NotRequired[str]
    score: NotRequired[str]
    pretext: NotRequired[str]
    replay: NotRequired[str]
    content: NotRequired[str]
    seal: NotRequired[str]


class Manifest(TypedDict):
    """manifest.json of a task, or of a snapshot within one."""

    format: int
    run: NotRequired[str]
    previous: NotRequired[str | None]
    learnt: TaskNumber
    backbone: str
    method: NotRequired[str]
    tasks: list[TaskFacts]
    rows: NotRequired[list[RowFacts]]
    step: NotRequired[Natural]
    scaler: NotRequired[dict[str, int | float]]
    alone: NotRequired[bool]
    forgotten: NotRequired[list[str]]
    source: NotRequired[LessonSource]
    earlier: NotRequired[dict[str, LessonSource]]
    device: NotRequired[str]
    processes: NotRequired[int]
    held_out_share: NotRequired[Annotated[float, Meta(ge=0, lt=1)]]
    finished: NotRequired[str]
    seconds: NotRequired[Seconds]
    images: NotRequired[Natural]
    trainable_parameters: NotRequired[Natural]
    peak_rss_bytes: NotRequired[Natural]
    sha256: dict[str, str]
    bytes: NotRequired[dict[str, Natural]]
    seal: str


class Resolved(TypedDict):
    """How a run computes: see `perdure.training.runtime.Runtime`."""

    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    attention: Literal["eager", "sdpa"]
    threads: Annotated[int, Meta(ge=1, le=65_536)]
    processes: NotRequired[Annotated[int, Meta(ge=1, le=65_536)]]


class BackboneFacts(TypedDict):
    """Which weights a run began with."""

    spec: NotRequired[str]
    fingerprint: NotRequired[str]
    preprocess: NotRequired[dict[str, Any]]


class StreamFacts(TypedDict):
    """What is learnt; notes of the stream stand beside these."""

    name: NotRequired[str]
    scenario: Literal["class", "task", "domain"]
    tasks: list[TaskFacts]
    skipped: NotRequired[list[str]]
    sequence: NotRequired[Any]


class RunRecord(TypedDict):
    """run.json."""

    format: NotRequired[int]
    perdure: NotRequired[str]
    created: NotRequired[str]
    git: NotRequired[str | None]
    seed: NotRequired[int]
    config: dict[str, bool | int | float | str | list[str] | None]
    lr: NotRequired[float]
    resolved: Resolved
    backbone: BackboneFacts
    versions: NotRequired[dict[str, str]]
    stream: StreamFacts
    held_out: NotRequired[dict[str, StreamFacts]]
    seal: NotRequired[str]


class Moves(TypedDict):
    """moved.json: where things were, and where they are."""

    moved: list[tuple[str, str]]
    seal: str


class Resized(TypedDict):
    """resized.json: what a backbone reads now that it did not when the run began."""

    backbone: dict[str, int | float | str]
    seal: str


class Summary(TypedDict, total=False):
    """summary.json: numbers, and the manifest that they end with."""

    matrix: list[list[float | None]]
    score: str
    acc: float | None
    aaa: float | None
    forgetting: float | None
    bwt: float | None
    fwt: float | None
    retention: float | None
    acc_with_task_id: float | None
    task_id_acc: float | None
    forgetting_with_task_id: float | None
    feature_drift: float | None
    transfer: float | None
    average: float | None
    online: dict[str, Any]
    anytime_acc: float | None
    few_shot: dict[str, list[float | None]]
    early_stop: dict[str, Any]
    performance_drop: float | None
    harmonic_mean: float | None
    zero_shot: dict[str, dict[str, Any]]
    zero_shot_ratio: float | None
    lenient_matrix: list[list[float | None]]
    empty_matrix: list[list[float | None]]
    unparsable_matrix: list[list[float | None]]
    lenient_acc: float | None
    lenient_forgetting: float | None
    empty: float | None
    unparsable: float | None
    scores: list[str]
    unlike_scores: str
    answers: dict[str, dict[str, dict[str, Any]]]
    answers_kept_strict: float | None
    answers_kept_lenient: float | None
    recall: dict[str, dict[str, list[float | None]]]
    class_accuracy: dict[str, float]
    confusion: list[list[float | None]]
    trainable_parameters: Natural
    stored_bytes: Natural
    seconds_per_task: list[dict[str, float]]
    evaluation_seconds: float
    images_per_second: float | None
    peak_rss_bytes: Natural
    skipped_images: Natural
    manifest: str
    seal: str


class Query(TypedDict):
    """A text that is searched for, and the identities of the images found."""

    task: str
    text: str
    pair: int
    before: list[int]
    after: NotRequired[list[int]]


class AskedQuestion(TypedDict):
    """A test question of a task, and what was said `before` the stream, once `learnt`, and in the `end`."""

    task: TaskNumber
    question: str
    truth: list[str]
    pictures: list[str]
    said: dict[str, str]
    right: list[str]


class Examples(TypedDict):
    """examples.json: what was searched for or asked, and pictures in base64 by name."""

    queries: NotRequired[list[Query]]
    questions: NotRequired[list[AskedQuestion]]
    searched: NotRequired[list[TaskNumber]]
    pictures: dict[str, str]
    learnt: NotRequired[TaskNumber]
    seal: NotRequired[str]


class Cost(TypedDict):
    """What a method's step costs; `ratio` None where `why` says the reason."""

    ratio: float | None
    why: NotRequired[str]


class Steps(TypedDict):
    """steps.json of a grid."""

    options: dict[str, Any]
    methods: dict[str, Cost]


class MemberFacts(TypedDict):
    """A finished learner among specialists; `run` is the seal of its run.json, `beside` its folder seen from theirs."""

    name: str
    folder: str
    beside: str
    run: str
    learnt: TaskNumber
    gives: Literal["classes", "captions", "conversations"]
    method: str
    backbone: str
    text: bool


class SpecialistsRecord(TypedDict):
    """specialists.json: members, how they are chosen, and the pool's classes as (member, name)."""

    format: int
    perdure: str
    created: str
    route: Literal["gaussian", "nearest", "subspace", "text", "linucb", "uniform"]
    gate: BackboneFacts
    pool_bytes: Natural
    members: list[MemberFacts]
    classes: list[tuple[Natural, str]]
    known: float | None
    sha256: str
    seal: str


class RoutingRow(TypedDict):
    """A row of routing.json: who answered, and what it took."""

    who: str
    accuracy: float
    asked: float
    milliseconds: float | None
    bytes: Natural


class RoutingTable(TypedDict):
    """routing.json: what was measured of specialists, on how many images, or questions where `things` says so."""

    images: Natural
    things: NotRequired[Literal["images", "questions"]]
    routing_accuracy: float | None
    rows: list[RoutingRow]
    seal: str


def seal(content: Mapping[str, Any]) -> str:
    """sha256 of what a JSON object says, whatever its layout; its own seal is left out."""
    text = json.dumps({k: v for k, v in content.items() if k != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` as it will be read, with its seal."""
    plain: dict[str, Any] = json.loads(json.dumps(content))  # tuples become lists, all keys texts
    return {**plain, "seal": seal(plain)}


def read_typed(path: Path, kind: type[T], remedy: str, must_be_sealed: bool = False) -> T:
    """The content of a JSON file.

    Args:
        path: of the file, which is there.
        kind: what it holds, one of the classes above.
        remedy: what to do when it holds something else.
        must_be_sealed: when False, a file without a seal is one of an older version.

    Raises:
        Damaged: names the file, and the field that is wrong.
    """
    return parse_typed(path.read_bytes(), kind, str(path), remedy, must_be_sealed)


def parse_typed(content: bytes, kind: type[T], where: str, remedy: str, must_be_sealed: bool = False) -> T:
    """The same for bytes that came from `where`."""
    found = decode_json(content, f"{where} is damaged", remedy)
    sealed_here = isinstance(found, dict) and ("seal" in found or must_be_sealed)
    if sealed_here and not (found.get("seal") == seal(found) and content.endswith(b"}\n")):
        raise Damaged(f"{where} is damaged: its content does not match its seal, it was changed; {remedy}")
    return validated(found, kind, f"{where} is damaged", remedy)


def decode_json(content: bytes, what: str, remedy: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """JSON as it stands there, of whatever form.

    Args:
        content: in UTF-8, with a byte order mark or without.
        what: begins the message when it cannot be read.
        remedy: ends it.
        hook: see `json.loads`.

    Raises:
        Damaged: in one line.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_hook=hook)
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is no UTF-8 text"
    except RecursionError:
        why = "brackets are nested too deeply"
    except ValueError as error:
        why = f"it cannot be read as JSON ({error})"
    raise Damaged(f"{what}: {why}; {remedy}")


def validated(found: Any, kind: type[T], what: str, remedy: str) -> T:
    """`found`, once it is known to be of `kind`; the message names the field that is wrong."""
    try:
        msgspec.convert(found, kind)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise Damaged(f"{what}: {said(error)}; {remedy}") from error
    return cast(T, found)  # as it is: fields that are not listed stay


def said(error: Exception, within: str = "") -> str:
    """A type error as `field: what is wrong`; `within` is what the fields belong to."""
    wrong, _, place = str(error).replace("`", "").partition(" - at ")
    field = f"{within}{place.removeprefix('$')}".lstrip(".")
    wrong = f"{wrong[:1].lower()}{wrong[1:]}"[:200]
    return f"{field}: {wrong}" if field else wrong
