"""What cannot be done is refused in one line that says what to do, and nothing that was learnt is lost."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.cli.console import Screen
from perdure.cli.main import main
from perdure.core.checkpoint import locked
from perdure.storage.files import write_sealed


def one_line(answer: Any, *said: str) -> None:
    """`answer` is a refusal in one line which holds each of `said`."""
    assert answer.code == 2, answer
    assert answer.err.startswith("perdure: "), answer
    assert answer.err.count("\n") == 1, answer
    for words in said:
        assert words in answer.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "lorra"], "unknown method 'lorra'; did you mean 'lora'?"),
        (["--method", "ewc"], "ewc has nothing to protect"),
        (["--stream", "syntetic()"], "unknown stream 'syntetic'; did you mean 'synthetic'?"),
        (
            ["--stream", "images(path='nowhere', tasks=2)"],
            "path='nowhere' does not exist; give a folder of class folders",
        ),
        (["--backbone", "tinny()"], "unknown backbone 'tinny'; did you mean 'tiny'?"),
        (["--objective", "classfy()"], "unknown objective 'classfy'; did you mean 'classify'?"),
        (["--objective", "zeroshot()"], "zeroshot needs a text tower, which tiny("),
        (["--method", "lora(rank=99)"], "rank=99: expected 1 to 32"),
        (
            ["--method", "lora(tower='text')", "--backbone", "tiny(text=True)"],
            "trainable parameters get no gradient, the first is method.adapters.0.down",
        ),
        (["--lr", "nan"], "--lr nan: expected float above 0"),
        (["--device", "gpu"], "device 'gpu' cannot be used here (devices are called cuda, cpu, mps, ...); use auto"),
    ],
)
def test_a_run_that_cannot_be_is_refused_and_leaves_its_folder_free(
    flags: list[str], said: str, perdure: Any, small: Any
) -> None:
    one_line(perdure("run", *small, *flags, "--out", "x"), said)
    assert not Path("x").exists()


def test_a_refused_run_can_be_corrected_in_the_same_folder(perdure: Any, small: Any) -> None:
    assert perdure("run", *small, "--method", "lora(rank=99)", "--out", "x").code == 2
    assert perdure("run", *small, "--method", "lora(rank=2)", "--out", "x").code == 0
    one_line(perdure("run", *small, "--out", "x"), "x already holds a run: go on with 'perdure resume x'")


def test_unreadable_images_are_named_or_skipped_and_listed(perdure: Any, tiny: Any, photos: Any) -> None:
    folder = photos("bad", "cat dog")
    (folder / "cat" / "03.png").write_bytes(b"no image")
    whole = (folder / "dog" / "02.png").read_bytes()
    (folder / "dog" / "02.png").write_bytes(whole[: len(whole) // 2])
    listed = ["bad/cat/03.png", "bad/dog/02.png"]
    flags = (*tiny, "--epochs", 1, "--out")

    refused = perdure("run", "--stream", "images(path='bad', tasks=2, order='natural')", *flags, "a")
    one_line(refused, "bad/cat/03.png: not an image", "or leave it out with skip_bad=True in the stream")
    ran = perdure("run", "--stream", "images(path='bad', tasks=2, skip_bad=True)", *flags, "b")
    assert f"2 unreadable images were left out: {Path('bad').absolute()}" in ran.out
    skipped = json.loads(Path("b/run.json").read_text())["stream"]["skipped"]
    assert sorted(skipped) == [str(Path(name).absolute()) for name in listed]
    assert json.loads(Path("b/summary.json").read_text())["skipped_images"] == 2

    asked = perdure("learn", folder, "--into", "c", "--backbone", "tiny()")
    one_line(asked, "cannot read image bad/", "; replace or remove it, or leave it out with --skip-bad\n")
    taught = perdure("learn", folder, "--into", "c", "--backbone", "tiny()", "--skip-bad", "--json")
    assert sorted(taught.events[-1]["skipped"]) == listed
    assert json.loads(Path("c/summary.json").read_text())["skipped_images"] == 2
    assert sorted(json.loads(Path("c/task-000/manifest.json").read_text())["source"]["skipped"]) == listed
    one_line(perdure("predict", "c", folder / "cat" / "03.png"), "cannot read image bad/cat/03.png")


def folders(photos: Callable[..., Path]) -> None:
    photos("strange/train", "cat dog")
    photos("strange/test", "cat emu", 2)
    Path("empty").mkdir()
    Path("hollow/cat").mkdir(parents=True)
    photos("single", "cat")
    Path("file").write_text("no folder")


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("strange", "class 'emu' is in test"),
        ("empty", "empty' is empty; expected a folder for each class"),
        ("hollow", "hollow' has class folders (cat, ...) but no image in them"),
        ("single", "only"),
        ("singel", "path='singel' does not exist; did you mean 'single'?"),
        ("file", "file' is a file; give a folder of class folders"),
    ],
)
def test_folders_without_what_is_needed_are_refused(
    folder: str, said: str, perdure: Any, tiny: Any, photos: Any
) -> None:
    folders(photos)
    one_line(perdure("run", "--stream", f"images(path={folder!r}, tasks=1)", *tiny, "--out", "x"), said)
    one_line(perdure("learn", folder, "--into", "y", "--backbone", "tiny()"), said)
    assert not list(Path().glob("[xy]/*.json"))


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "photos", "photos/cat/00.png"),
        ("resume", "photos"),
        ("eval", "photos"),
        ("report", "photos"),
        ("export", "photos", "--out", "y"),
    ],
)
def test_a_folder_that_is_no_learner_is_refused(words: tuple[str, ...], perdure: Any, photos: Any) -> None:
    photos("photos", "cat")
    before = sorted(Path().rglob("*"))
    one_line(perdure(*words), "photos is n", "run.json")
    one_line(perdure(words[0], "nowhere", *words[2:]), "nowhere is n", "run.json")
    assert sorted(Path().rglob("*")) == before


def changed(**facts: Any) -> Callable[[Path], None]:
    """Damage to a JSON object: other values, or none where they are `...`."""

    def change(path: Path) -> None:
        kept = json.loads(path.read_text()) | facts
        write_sealed(path, {key: value for key, value in kept.items() if value is not ...})

    return change


def scaled(path: Path) -> None:
    """Another number in a file whose seal stays."""
    path.write_text(path.read_text().replace("0.", "1.", 1))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def written(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


# Of all that is no JSON, or none of a kind: two; the reader of all files is shown the others.
RUINS = [halve, written(b"[]")]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished grid; not to be changed."""
    folder = tmp_path_factory.mktemp("grids")
    stream = "synthetic(tasks=2, classes_per_task=2, per_class=6, test_per_class=4)"
    words = [*GRID, "--stream", stream, "--epochs", "1", "--backbone", "tiny()", "--precision", "fp32"]
    main([*words, "--attention", "sdpa", "--out", str(folder / "grid")])
    return folder / "grid"


GRID = ["compare", "--methods", "probe", "ncm", "--seeds", "0"]


@pytest.fixture
def asking(grid: Path, perdure: Any, small: Any) -> Callable[[], dict[str, Any]]:
    """What the commands that read a grid answer."""
    shutil.copytree(grid, "grid")
    words = {
        "compare": (*GRID, *small, "--out", "grid"),
        "report": ("report", "grid"),
        "advise": ("advise", "--from", "grid"),
    }
    return lambda: {name: perdure(*asked) for name, asked in words.items()}


def test_a_run_and_several_runs_never_share_a_folder(grid: Path, perdure: Any, small: Any, photos: Any) -> None:
    photos("photos", "cat dog")
    shutil.copytree(grid, "grid")
    Path("runs").mkdir()
    shutil.copytree(grid / "ncm-seed0", "runs/one")
    Path("team").mkdir()
    Path("team/specialists.json").write_text("{}")
    before = sorted(Path().rglob("*"))
    for out, said in (("grid", "grid is the folder of several runs, as compare.json says"), ("runs", "one/run.json")):
        one_line(perdure("run", *small, "--out", out), said, "give one of its own")
        one_line(perdure("learn", "photos", "--into", out, "--backbone", "tiny()"), said)
        one_line(perdure("pretrain", "photos", "--into", out, "--backbone", "tiny()"), said)
    tune = ("tune", *small, "--method", "lora(rank=?)", "--space", "rank=1..2")
    for words in ((*GRID, *small), ("demo",), tune):
        one_line(perdure(*words, "--out", "runs/one"), "runs/one holds a run or a learner", "give another --out")
        one_line(perdure(*words, "--out", "team"), "team holds specialists")
    one_line(perdure("run", *small, "--out", "team"), "team holds specialists")
    assert sorted(Path().rglob("*")) == before
    assert perdure(*GRID, *small, "--out", "grid").code == 0


@pytest.mark.parametrize("ruin", [*RUINS, changed(methods=...), changed(methods={"ncm": {"ratio": []}})])
def test_a_damaged_steps_file_of_a_grid_is_named(ruin: Callable[[Path], None], asking: Any) -> None:
    ruin(Path("grid/steps.json"))
    for answer in asking().values():
        one_line(answer, "grid/steps.json is damaged", "remove it, the grid's command measures it anew")
    if ruin is halve:  # once: it takes seconds
        Path("grid/steps.json").unlink()
        assert {answer.code for answer in asking().values()} == {0}


@pytest.mark.parametrize("ruin", [*RUINS, scaled, changed(matrix=[[1], [2]]), changed(manifest="0" * 64)])
def test_a_damaged_summary_is_told_of_and_made_again_from_the_manifests(
    ruin: Callable[[Path], None], asking: Any, perdure: Any
) -> None:
    folder = Path("grid/ncm-seed0")
    before = (folder / "summary.json").read_bytes()
    perdure("report", "grid")
    page = Path("grid/report.html").read_bytes()
    ruin(folder / "summary.json")
    answers = asking()
    assert {answer.code for answer in answers.values()} == {0}
    for name in ("compare", "report"):
        assert answers[name].out.count("its numbers are taken from the manifests") == 1
    assert Path("grid/report.html").read_bytes() == page
    mended = perdure("resume", folder)
    assert f"{folder}/summary.json was not what the manifests say: it was written anew" in mended.out
    assert (folder / "summary.json").read_bytes() == before


@pytest.mark.parametrize("lost", ["stored_bytes", "trainable_parameters", "seconds_per_task"])
def test_a_summary_without_manifests_or_numbers_that_the_table_needs_is_named(lost: str, asking: Any) -> None:
    for task in Path("grid/ncm-seed0").glob("task-*"):
        shutil.rmtree(task)
    changed(**{lost: ...})(Path("grid/ncm-seed0/summary.json"))
    answers = asking()
    said = "grid/ncm-seed0/summary.json is damaged: numbers are missing; remove it, and the same command writes it anew"
    one_line(answers["compare"], said)
    assert (answers["report"].code, answers["advise"].code) == (0, 0)  # which make do with the results


def test_a_grid_tells_of_damage_before_it_goes_on(asking: Any) -> None:
    halve(Path("grid/steps.json"))
    shutil.rmtree("grid/probe-seed0")
    one_line(asking()["compare"], "grid/steps.json is damaged")
    assert not Path("grid/probe-seed0").exists()


@pytest.mark.parametrize(
    ("ruin", "field"),
    [
        *((ruin, "") for ruin in (*RUINS, scaled)),
        (changed(config=3), "config: expected object, got int"),
        (changed(config=...), "object missing required field config"),
        (changed(stream=[]), "stream: expected object, got array"),
        (changed(stream={"tasks": 3}), "stream.tasks: expected array, got int"),
        (changed(stream={"scenario": "class", "tasks": [{"train": "many"}]}), "stream.tasks[0].train: expected int"),
        (changed(stream={"scenario": [], "tasks": []}), "stream.scenario: expected str, got array"),
        (changed(seed="one"), "seed: expected int, got str"),
        (changed(stream={"scenario": "class", "tasks": [{"index": 10**400}]}), "stream.tasks[0].index: expected int"),
        (changed(resolved={}), "resolved: object missing required field device"),
        (
            changed(resolved={"device": "cpu", "precision": "fp3", "attention": "sdpa", "threads": 1}),
            "resolved.precision: invalid enum value 'fp3'",
        ),
        (
            changed(resolved={"device": "cpu", "precision": "fp32", "attention": "sdpa", "threads": 0}),
            "resolved.threads: expected int >= 1",
        ),
    ],
)
def test_a_damaged_record_is_named_with_its_field(ruin: Callable[[Path], None], field: str, asking: Any) -> None:
    ruin(Path("grid/ncm-seed0/run.json"))
    for answer in asking().values():
        one_line(answer, f"grid/ncm-seed0/run.json is damaged: {field}", "restore it, or remove grid/ncm-seed0 to")


def test_a_setting_that_is_none_is_named_with_its_field(perdure: Any, small: Any) -> None:
    perdure("run", *small, "--out", "x")
    for task in Path("x").glob("task-*"):  # whose manifests would not know such a record
        shutil.rmtree(task)
    config = json.loads(Path("x/run.json").read_text())["config"]
    changed(config=config | {"epochs": "many"})(Path("x/run.json"))
    one_line(perdure("resume", "x"), "x/run.json is damaged: config.epochs: expected int, got str")
    changed(config=config | {"lr": -1})(Path("x/run.json"))
    one_line(perdure("resume", "x"), "x/run.json is damaged: config: lr=-1", "expected float above 0")


@pytest.mark.parametrize("line", [b'{"after": -2, "on": 0, "metric": "accuracy", "value": 1}\n', b"\xff\n", b"3\n"])
def test_results_that_were_changed_are_told_of_and_made_again_from_the_manifests(
    line: bytes, asking: Any, perdure: Any
) -> None:
    path = Path("grid/ncm-seed0/results.jsonl")
    before = path.read_bytes()
    path.write_bytes(line + before)
    perdure("report", "grid")
    page = Path("grid/report.html").read_bytes()
    answers = asking()
    assert {answer.code for answer in answers.values()} == {0}
    for name in ("compare", "report"):
        assert answers[name].out.count("results.jsonl is not what the manifests say") == 1
    assert Path("grid/report.html").read_bytes() == page
    mended = perdure("resume", path.parent)
    assert f"{path} was not what the manifests say: it was written anew" in mended.out
    assert path.read_bytes() == before


def test_a_result_of_no_task_is_named_by_its_line_where_no_manifest_knows_better(perdure: Any, grid: Path) -> None:
    shutil.copytree(grid / "ncm-seed0", "x", ignore=shutil.ignore_patterns("task-*"))
    path = Path("x/results.jsonl")
    for number in ("-2", "1e999", "null", "99999"):
        path.write_text(f'{{"after": {number}, "on": 0, "metric": "accuracy", "value": 1}}\n')
        one_line(perdure("report", "x"), "x/results.jsonl, line 1, is damaged")


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 0.5), ("epochs", 7), ("optimizer", "sgd"), ("precision", "bf16"), ("seed", 1)]
)
def test_a_stopped_run_whose_record_was_changed_is_not_resumed(key: str, value: Any, perdure: Any, small: Any) -> None:
    perdure("run", *small, "--out", "x")
    shutil.rmtree("x/task-001")
    path = Path("x/run.json")
    content = json.loads(path.read_text())
    content["config"][key] = value
    path.write_text(json.dumps(content) + "\n")
    one_line(perdure("resume", "x"), "x/run.json is damaged: its content does not match its seal, it was changed")
    for form in (write_sealed, unseal):  # sealed anew, and as if there had never been a seal
        form(path, content)
        one_line(perdure("resume", "x"), "x/task-000/manifest.json comes from another run", "x/run.json")


def unseal(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("seal", "format")}))


def test_a_learner_of_another_backbone_is_refused(perdure: Any, small: Any, photos: Any) -> None:
    perdure("run", *small, "--out", "x")
    changed(backbone="5f" * 32)(Path("x/task-001/manifest.json"))
    photos("new", "cat")
    one_line(perdure("predict", "x", "new/cat"), "x/task-001 was learnt on another backbone", "give the weights")


def test_a_device_that_this_machine_lacks_is_named_with_the_way_out(perdure: Any, small: Any, photos: Any) -> None:
    perdure("run", *small, "--out", "x")
    whole = perdure("predict", "x", photos("new", "cat dog")).out
    record = json.loads(Path("x/run.json").read_text())
    record["resolved"]["device"] = "xla"
    record.pop("seal"), record.pop("format")  # as an older version wrote it
    Path("x/run.json").write_text(json.dumps(record))
    for task in Path("x").glob("task-*"):
        manifest = json.loads((task / "manifest.json").read_text()) | {"format": 1}
        manifest["tasks"] = [{"total": None} | t for t in record["stream"]["tasks"][: manifest["learnt"]]]
        write_sealed(task / "manifest.json", manifest)
    asked = [("predict", "x", "new/cat"), ("eval", "x"), ("resume", "x"), ("learn", "new", "--into", "x")]
    for words in asked:
        one_line(perdure(*words), "x/run.json: device 'xla' cannot be used here", "give --device cpu")
    assert perdure("predict", "x", "new", "--device", "cpu").out == whole
    one_line(perdure("predict", "x", "new", "--device", "xpu:7"), "--device xpu:7 cannot be used here")
    assert "on cpu instead of xla numbers are rounded differently" in perdure("resume", "x", "--device", "cpu").out


def test_data_that_changed_since_is_noticed(perdure: Any, tiny: Any, photos: Any) -> None:
    photos("new", "cat dog")
    flags = ("--stream", "images(path='new', tasks=2)", *tiny, "--epochs", 1)
    assert perdure("run", *flags, "--out", "x").code == 0
    shutil.rmtree("x/task-001")
    shutil.copy("new/cat/00.png", "new/cat/zz.png")
    one_line(perdure("resume", "x"), "the data of x has changed since the run began", "restore it, or start anew")
    assert perdure("predict", "x", "new/cat/00.png").code == 0
    Path("new/cat/zz.png").unlink()
    assert perdure("resume", "x").code == 0


def test_a_second_process_waits_outside(perdure: Any, small: Any, photos: Any) -> None:
    perdure("run", *small, "--out", "x")
    said = "another process is working in x: wait for it, or give another folder"
    with locked(Path("x")):
        one_line(perdure("resume", "x"), said)
        one_line(perdure("learn", photos("new", "cat dog"), "--into", "x"), said)
        one_line(perdure("run", *small, "--out", "x"), said)
        assert perdure("predict", "x", "new/cat").code == 0
        assert perdure("report", "x").code == 0
    with locked(Path("grid")):
        one_line(
            perdure("compare", "--methods", "probe", *small, "--out", "grid"), "another process is working in grid"
        )


def test_a_folder_that_cannot_be_written_is_named(perdure: Any, small: Any) -> None:
    Path("file").write_text("no folder")
    one_line(perdure("run", *small, "--out", "file/x"), "file/x is a file, or lies in one: give a folder")
    one_line(perdure("run", *small, "--out", "file"), "file")
    perdure("run", *small, "--out", "x")
    one_line(perdure("report", "x", "--out", "file/r.html"), "file/r.html cannot be written")


def test_training_that_diverges_says_so_and_keeps_what_was_learnt(perdure: Any, small: Any, photos: Any) -> None:
    wild = ("--method", "finetune", "--optimizer", "sgd", "--lr", "1e6", "--epochs", 30)
    one_line(
        perdure("run", *small, *wild, "--out", "x"),
        "training diverged in task 1",
        "start anew in another folder with a lower --lr than 1e+06",
    )
    photos("new", "cat dog"), photos("more", "emu fox")
    made = ("--backbone", "tiny()", "--method", "finetune(backbone_lr=1.0)")
    assert perdure("learn", "new", "--into", "y", *made).code == 0
    before = perdure("predict", "y", "new/cat/00.png").out
    one_line(
        perdure("learn", "more", "--into", "y", "--lr", "1e6", "--epochs", 30),
        "training diverged in task 2",
        "teach it again with a lower --lr than 1e+06",
    )
    assert perdure("predict", "y", "new/cat/00.png").out == before
    assert perdure("learn", "more", "--into", "y", "--epochs", 1).code == 0


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(
    perdure: Any, small: Any, content_of: Any, no_file_above: Any
) -> None:
    flags = (*small, "--method", "inflora(rank=2)", "--epochs", "3", "--save-every", "1000")
    assert perdure("run", *flags, "--out", "whole").code == 0
    sizes = [Path("whole", t, "learner.safetensors").stat().st_size for t in ("task-000", "task-001")]
    most = sum(sizes) // 2
    assert sizes[0] < most < sizes[1]

    with no_file_above(most):
        one_line(
            perdure("run", *flags, "--out", "x"),
            "perdure: File too large: ",
            "free some space, then go on with 'perdure resume'",
        )
    assert not Path("x/task-001/manifest.json").exists()
    assert perdure("resume", "x").code == 0
    assert content_of(Path("x")) == content_of(Path("whole"))


def test_a_report_on_a_full_disk_does_not_advise_to_resume(perdure: Any, small: Any, no_file_above: Any) -> None:
    perdure("run", *small, "--out", "x")
    page = Path("x/report.html").read_bytes()
    with no_file_above(1000):
        answer = perdure("report", "x")
    one_line(answer, "x/report.html cannot be written (File too large): make room there, or give another --out")
    assert Path("x/report.html").read_bytes() == page
    assert not list(Path("x").glob(".*draft*"))


class Stops(Screen):
    """A terminal at which Control-C is pressed in one step of one task."""

    place = (0, 0)

    def task(self, task: Any, *more: Any) -> None:
        self.index = task.index
        super().task(task, *more)

    def step(self, step: int, *more: Any) -> None:
        super().step(step, *more)
        if (self.index, step) == self.place:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def pressed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`pressed(1, 2)`: the next command gets Control-C in step 2 of task 1; `pressed(-1, 0)`: none."""

    def press(task: int, step: int) -> None:
        monkeypatch.setattr(Stops, "place", (task, step))
        monkeypatch.setattr("perdure.cli.main.Screen", Stops)

    return press


def test_control_c_saves_and_says_how_to_go_on(perdure: Any, small: Any, pressed: Any, content_of: Any) -> None:
    flags = (*small, "--epochs", 4, "--save-every", 1000)
    assert perdure("run", *flags, "--out", "whole").code == 0
    pressed(1, 2)
    stopped = perdure("run", *flags, "--out", "x")
    assert stopped.code == 130
    assert stopped.err == "perdure: stopped after step 2 of task 2, all is saved; go on with 'perdure resume x'\n"
    pressed(-1, 0)
    assert perdure("resume", "x").code == 0
    assert content_of(Path("x")) == content_of(Path("whole"))


def test_control_c_in_a_grid_goes_on_with_the_same_command(
    perdure: Any, small: Any, pressed: Any, content_of: Any
) -> None:
    words = ("compare", "--methods", "lora(rank=2)", "probe", *small, "--epochs", 4, "--save-every", 1000, "--seeds", 0)
    assert perdure(*words, "--out", "whole").code == 0
    pressed(1, 2)
    stopped = perdure(*words, "--out", "grid")
    assert stopped.code == 130
    assert "lora_rank=2-seed0: stopped after step 2 of task 2, all is saved; the same command goes on" in stopped.err
    pressed(-1, 0)
    assert perdure(*words, "--out", "grid").code == 0
    for cell in Path("whole").glob("*-seed0"):
        assert content_of(cell) == content_of(Path("grid") / cell.name)


def test_control_c_while_learning_goes_on_with_the_same_folder(perdure: Any, photos: Any, pressed: Any) -> None:
    photos("new", "cat dog"), photos("more", "emu fox")
    assert perdure("learn", "new", "--into", "x", "--backbone", "tiny()", "--epochs", 2).code == 0
    shutil.copytree("x", "whole")
    assert perdure("learn", "more", "--into", "whole", "--epochs", 4).code == 0
    pressed(1, 2)
    stopped = perdure("learn", "more", "--into", "x", "--epochs", 4)
    assert stopped.code == 130
    assert "go on with 'perdure learn more --into x' and the same options" in stopped.err
    pressed(-1, 0)
    assert perdure("predict", "x", "new/cat/00.png").code == 0
    one_line(
        perdure("learn", "more", "--into", "x", "--epochs", 9),
        "now the options differ: give the same to finish that, or remove x/task-001 to give it up",
    )
    one_line(perdure("learn", "new", "--into", "x", "--epochs", 4), "now the folders differ")
    assert perdure("learn", "more", "--into", "x", "--epochs", 4).code == 0
    name = "task-001/learner.safetensors"
    assert Path("x", name).read_bytes() == Path("whole", name).read_bytes()


def test_interrupted_before_anything_was_done_is_no_traceback(
    perdure: Any, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(_screen: Screen, _text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Screen, "wait", wait)
    stopped = perdure("run", *small, "--out", "x")
    assert stopped.code == 130
    assert stopped.err.startswith("perdure: stopped at once")


def test_results_do_not_stand_among_the_data(perdure: Any, photos: Any) -> None:
    jan = photos("jan", "cat dog", 2)
    before = sorted(jan.rglob("*"))
    plain = ("--backbone", "tiny()", "--epochs", 1)
    one_line(perdure("learn", "jan", "--into", "jan", *plain), "jan is the data's own folder", "give another")
    one_line(perdure("pretrain", "jan", "--into", "jan", *plain), "jan is the data's own folder")
    stream = ("--stream", "images(path='jan', tasks=2)")
    one_line(perdure("run", *stream, *plain, "--out", "jan"), "jan is the data's own folder")
    one_line(perdure("compare", *stream, *plain, "--methods", "probe", "--out", "jan"), "jan is the data's own folder")
    for command in (["learn", "jan", "--into"], ["run", *stream, "--out"]):
        within = perdure(*command, "jan/mine", *plain)
        one_line(within, f"{Path('jan/mine')} is the folder of a learner or a run: keep it apart from images to learn")
    assert sorted(jan.rglob("*")) == before
