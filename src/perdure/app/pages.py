"""The page, by Gradio: what it asks of the service, and how it shows the answers."""

import functools
import html
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from perdure.api.chat import Talk
from perdure.app import drawing
from perdure.app.gate import Gate
from perdure.app.service import Service
from perdure.app.uploads import looked_at
from perdure.app.words import CHINESE, ENGLISH, worded

_KEY = "perdure_{}"
"""Apart from all that people may call a grid or a class: the page would translate these too."""
_LANGUAGES = {"en": ENGLISH, **dict.fromkeys(("zh", "zh-CN", "zh-TW", "zh-HK", "zh-SG"), CHINESE)}
WORDS = gr.I18n(**{name: {_KEY.format(k): v for k, v in texts.items()} for name, texts in _LANGUAGES.items()})
_DROP = 140  # pixels of where files are dropped
_WAIT = 80  # pixels where the spinner turns until there is an answer
_MANY = 16
"""Events of one kind at a time; the learner has them take turns."""


class Page:
    """All of it.

    Args:
        service: what it asks.
        gate: who may upload and teach.
    """

    def __init__(self, service: Service, gate: Gate) -> None:
        self.service, self.gate = service, gate

    def build(self) -> gr.Blocks:
        """The page as Gradio has it."""
        asks = self.service.asks
        with gr.Blocks(title="perdure", analytics_enabled=False, delete_cache=(3600, 7200)) as page:
            known = gr.HTML()
            with gr.Tabs():
                if asks == "conversations":
                    self._asking()
                    self._chatting()
                else:
                    self._predicting()
                    self._searching()
                self._teaching(asks, known)
                self._comparing()
                self._reporting()
            page.load(self._known, None, known, api_visibility="private")
        return page

    def _on(self, event: Any, work: Callable[..., Any], inputs: Any, outputs: Any, **more: Any) -> Any:
        """An event, whose mistakes are told as they stand and which no program may call: for those there is HTTP."""
        options = {"api_visibility": "private", "concurrency_limit": _MANY} | more
        return event(_told(work), inputs, outputs, **options)

    def _known(self, request: gr.Request) -> str:
        names = self.service.names()
        languages = _languages(request)
        if self.gate.closed or not self.gate.opens(request.headers):
            return drawing.sentence(worded("closed", languages, why=self.gate.remedy()))
        return drawing.sentence(
            worded("known", languages, names=", ".join(names)) if names else worded("nothing", languages)
        )

    def _predicting(self) -> None:
        with gr.Tab(_text("predict"), id="predict"):
            files = gr.File(
                file_count="multiple", file_types=["image"], label=_text("pictures"), elem_id="look-at", height=_DROP
            )
            with gr.Accordion(_text("camera"), open=False):
                camera = gr.Image(sources=["webcam"], type="filepath", label=_text("camera"), show_label=False)
            choices = gr.Textbox(label=_text("choices"), lines=1, max_lines=8, visible=self._reads())
            button = gr.Button(_text("look"), variant="primary", elem_id="look")
            answers = gr.HTML(elem_id="answers", min_height=_WAIT)
        self._on(button.click, self._predict, [files, camera, choices], answers)

    def _predict(self, files: list[str] | None, camera: str | None, choices: str | None) -> str:
        given = _named([*(files or []), *([camera] if camera else [])])
        shown = looked_at(given, self.service.limits)
        words = [line.strip() for line in (choices or "").splitlines() if line.strip()]
        found = self.service.predict(shown, 5, words)
        return self._unread(words) + drawing.cards(
            [(n, image, bars) for (n, _), image, bars in zip(given, shown, found, strict=True)]
        )

    def _searching(self) -> None:
        with gr.Tab(_text("search"), id="search"):
            words = gr.Textbox(label=_text("words"), elem_id="words", visible=self._reads())
            picture = gr.File(file_types=["image"], label=_text("picture"), elem_id="like", height=_DROP)
            button = gr.Button(_text("find"), variant="primary", elem_id="find")
            found = gr.HTML(elem_id="found")
        self._on(button.click, self._search, [words, picture], found)
        self._on(words.submit, self._search, [words, picture], found)

    def _search(self, words: str | None, picture: str | None) -> str:
        words = words or ""
        if picture and words.strip():
            raise ValueError("words and a picture at once: take one of the two away")
        if not picture and not self._reads():
            raise ValueError("there is no picture to compare with: give one")
        wanted: str | Image.Image = words
        if picture:
            (wanted,) = looked_at(_named([picture]), self.service.limits)
        found = self.service.search(wanted)
        return self._unread([] if picture else [words]) + drawing.cards(
            [(each.name, each.picture, [("cos", each.cosine)]) for each in found]
        )

    def _unread(self, texts: list[str]) -> str:
        return "".join(map(drawing.sentence, self.service.unread(texts)))

    def _asking(self) -> None:
        with gr.Tab(_text("ask"), id="ask"):
            files = gr.File(
                file_count="multiple", file_types=["image"], label=_text("pictures"), elem_id="ask-about", height=_DROP
            )
            question = gr.Textbox(label=_text("question"), elem_id="question")
            button = gr.Button(_text("ask"), variant="primary", elem_id="ask")
            answer = gr.Textbox(label=_text("answer"), interactive=False, elem_id="answer")
        for event in (button.click, question.submit):
            self._on(event, self._ask, [files, question], answer)

    def _ask(self, files: list[str] | None, question: str) -> str:
        shown = looked_at(_named(files), self.service.limits) if files else []
        return self.service.ask(shown, question)

    def _chatting(self) -> None:
        with gr.Tab(_text("chat"), id="chat"):
            talk = gr.State(None)
            lines = gr.Chatbot(
                label=_text("chat"), elem_id="lines", render_markdown=False, allow_file_downloads=False, buttons=[]
            )
            files = gr.File(
                file_count="multiple", file_types=["image"], label=_text("pictures"), elem_id="chat-about", height=_DROP
            )
            line = gr.Textbox(label=_text("question"), elem_id="line")
            button = gr.Button(_text("send"), variant="primary", elem_id="send")
            anew = gr.Button(_text("again"))
        for event in (button.click, line.submit):
            self._on(event, self._chat, [talk, lines, files, line], [talk, lines, files, line])
        self._on(anew.click, lambda: (None, []), None, [talk, lines])

    def _chat(
        self, talk: Talk | None, lines: list[Any] | None, files: list[str] | None, line: str
    ) -> tuple[Talk, list[Any], None, str]:
        if not line.strip():
            raise ValueError("there is no question: say what you want to know")
        talk = self.service.talk(talk)
        before = talk.turns, [*talk.images], talk.waiting
        try:
            if files:
                talk.show(looked_at(_named(files), self.service.limits))
            answer = talk.say(line.strip())
        except ValueError:
            talk.turns, talk.images, talk.waiting = before
            raise
        shown = f"[{len(files)}] {line}" if files else line
        said = (("user", shown), ("assistant", answer))
        new = [{"role": role, "content": html.escape(text, quote=False)} for role, text in said]  # it is no HTML
        return talk, [*(lines or []), *new], None, ""

    def _teaching(self, asks: str, known: gr.HTML) -> None:
        with gr.Tab(_text("teach"), id="teach"):
            basket, lesson = gr.State([]), gr.State("")
            gr.Markdown(_text("how"))
            archive = gr.File(file_types=[".zip"], label=_text("archive"), elem_id="archive", height=_DROP)
            files = gr.File(
                file_count="multiple", file_types=["image"], label=_text("pictures"), elem_id="to-learn", height=_DROP
            )
            name = gr.Textbox(label=_text("class"), visible=asks == "classes", elem_id="class")
            collect = gr.Button(_text("collect"), visible=asks == "classes", elem_id="collect")
            collected = gr.HTML(elem_id="collected")
            captions = gr.Textbox(label=_text("captions"), lines=3, visible=asks == "captions", elem_id="captions")
            questions = gr.Textbox(label=_text("questions"), lines=3, visible=asks == "conversations", elem_id="pairs")
            skip = gr.Checkbox(label=_text("skip"))
            with gr.Row():
                button = gr.Button(_text("learn"), variant="primary", elem_id="learn")
                stop = gr.Button(_text("stop"), variant="stop", elem_id="stop")
            progress = gr.HTML(elem_id="progress")
            timer = gr.Timer(1, active=False)
        self._on(
            collect.click,
            self._collect,
            [basket, files, name],
            [basket, collected, files, name],
            show_progress_on=collected,
        )
        given = [basket, archive, files, name, captions, questions, skip]
        emptied = [basket, collected, archive, files, name, captions, questions]
        self._on(button.click, self._teach, given, [lesson, timer, *emptied], show_progress_on=progress)
        self._on(timer.tick, self._progress, lesson, [progress, timer, known], show_progress="hidden")
        self._on(stop.click, self._stop, lesson, None)

    def _collect(
        self, basket: list[Any], files: list[str] | None, name: str, request: gr.Request
    ) -> tuple[list[Any], str, None, str]:
        if not (files and name.strip()):
            raise ValueError(worded("nothing_given", _languages(request)))
        looked_at(_named(files)[:1], self.service.limits)
        basket = [*basket, (name.strip(), files)]
        names = ", ".join(f"{name} ({len(some)})" for name, some in basket)
        return basket, drawing.sentence(worded("collected", _languages(request), names=names)), None, ""

    def _teach(
        self,
        basket: list[Any],
        archive: str | None,
        files: list[str] | None,
        name: str,
        captions: str | None,
        questions: str | None,
        skip: bool,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        self._check(request)
        pictures = [(each, _named(some)) for each, some in [*basket, *([(name, files)] if files else [])]]
        if not (pictures or archive):
            raise ValueError(worded("nothing_given", _languages(request)))
        packed = (Path(archive).name, Path(archive)) if archive else None
        lesson = self.service.give(pictures, packed, captions or "", questions or "", skip)  # None where hidden
        return lesson.id, gr.Timer(active=True), [], "", None, None, "", "", ""

    def _progress(self, lesson: str, request: gr.Request) -> tuple[str, gr.Timer, Any]:
        shown = self.service.lessons[lesson]
        html = drawing.lesson(shown, self.service.lessons.before(shown), _languages(request))
        return html, gr.Timer(active=not shown.over), self._known(request) if shown.over else gr.skip()

    def _stop(self, lesson: str, request: gr.Request) -> None:
        self._check(request)
        if lesson:
            self.service.lessons.stop(lesson)

    def _check(self, request: gr.Request) -> None:
        if not self.gate.opens(request.headers):
            raise ValueError(self.gate.remedy())

    def _comparing(self) -> None:
        with gr.Tab(_text("compare"), id="compare") as tab:
            grid = gr.Dropdown(label=_text("grid"), elem_id="grid")
            table = gr.Markdown(elem_id="table", elem_classes="perdure-wide", sanitize_html=True)
            plots = gr.HTML(elem_id="plots")
        self._on(tab.select, self._grids, None, [grid, table, plots])
        self._on(grid.input, self._compare, grid, [table, plots])

    def _grids(self, request: gr.Request) -> tuple[Any, str, str]:
        names = list(self.service.grids())
        if not names:
            return gr.Dropdown(choices=[], value=None), worded("no_grids", _languages(request)), ""
        return gr.Dropdown(choices=names, value=names[0]), *self._compare(names[0])

    def _compare(self, grid: str) -> tuple[str, str]:
        return self.service.compared(grid), drawing.report(grid)

    def _reporting(self) -> None:
        with gr.Tab(_text("report"), id="report") as tab:
            shown = gr.HTML(elem_id="report-frame")
        self._on(tab.select, self._report, None, shown)

    def _report(self, request: gr.Request) -> str:
        if not self.service.taught():
            return drawing.sentence(worded("nothing", _languages(request)))
        return drawing.report(None)

    def _reads(self) -> bool:
        """Whether the learner can be asked by words."""
        return "text" in self.service.learner.backbone.towers()


def _told(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, whose mistakes reach who made them as one line."""

    @functools.wraps(work)
    def telling(*given: Any) -> Any:
        try:
            return work(*given)
        except ValueError as error:
            raise gr.Error(
                " ".join(str(error).split()), duration=None, title="perdure", print_exception=False
            ) from error

    telling.__signature__ = inspect.signature(work)  # type: ignore[attr-defined]  # Gradio gives the request to who asks
    return telling


def _text(key: str) -> Any:
    """In the language of whoever looks."""
    return WORDS(_KEY.format(key))


def _named(files: Sequence[str] | None) -> list[tuple[str, bytes | Path]]:
    return [(Path(file).name, Path(file)) for file in files or ()]


def _languages(request: gr.Request) -> str:
    return str(request.headers.get("accept-language", ""))
