"""The HTTP interface for programs: /api/..., JSON in every answer. docs/app.md has a curl line for each."""

import shutil
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute

from perdure.app.service import Service
from perdure.app.uploads import looked_at
from perdure.formatting import meant, printable, shortened
from perdure.reporting.report import write_report
from perdure.storage.files import temporary_folder

_MANY = Annotated[list[UploadFile], File()]


def interface(service: Service) -> FastAPI:
    """The application that answers /api/... and shows reports."""
    app = FastAPI(
        title="perdure",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        dependencies=[Depends(_known_fields)],
    )

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": " ".join(str(error).split())}, 422)

    @app.exception_handler(RequestValidationError)
    async def misread(_: Request, error: RequestValidationError) -> JSONResponse:
        wrong = error.errors()[0]
        field = str(wrong["loc"][-1]) if wrong["loc"] else "the request"
        return JSONResponse({"error": printable(f"{field}: {wrong['msg']}; see docs/app.md")}, 422)

    @app.get("/api/learner")
    def learner() -> dict[str, Any]:
        return service.describe()

    @app.post("/api/predict")
    def predict(
        images: _MANY,
        top: Annotated[int, Form()] = 5,
        classes: Annotated[list[str] | None, Form()] = None,
    ) -> list[dict[str, Any]]:
        found = service.predict(looked_at(_read(images), service.limits), top, classes or ())
        notes = _notes(service.unread(classes or ()))
        return [
            {"image": image.filename, "labels": [{"name": name, "score": score} for name, score in answer], **notes}
            for image, answer in zip(images, found, strict=True)
        ]

    @app.get("/api/search")
    def search(text: str, top: int = 12) -> list[dict[str, Any]]:
        found, notes = service.search(text, top), _notes(service.unread([text]))
        return [{"image": each.name, "cosine": each.cosine, **notes} for each in found]

    @app.post("/api/search")
    def search_by_picture(image: UploadFile, top: Annotated[int, Form()] = 12) -> list[dict[str, Any]]:
        (wanted,) = looked_at(_read([image]), service.limits)
        return [{"image": each.name, "cosine": each.cosine} for each in service.search(wanted, top)]

    @app.post("/api/ask")
    def ask(
        question: Annotated[str, Form()],
        images: Annotated[list[UploadFile] | None, File()] = None,
        tokens: Annotated[int, Form()] = 256,
    ) -> dict[str, Any]:
        shown = looked_at(_read(images), service.limits) if images else []
        return {"question": question, "answer": service.ask(shown, question, tokens)}

    @app.post("/api/teach")
    def teach(
        archive: Annotated[UploadFile | None, File()] = None,
        images: Annotated[list[UploadFile] | None, File()] = None,
        name: Annotated[str, Form(alias="class")] = "",
        captions: Annotated[str, Form()] = "",
        questions: Annotated[str, Form()] = "",
        skip_bad: Annotated[bool, Form()] = False,
    ) -> dict[str, Any]:
        with temporary_folder() as folder:
            given = None
            if archive is not None:
                given = archive.filename or "photos.zip", folder / "given.zip"
                with given[1].open("wb") as packed:
                    shutil.copyfileobj(archive.file, packed)
            lesson = service.give([(name, _read(images))] if images else [], given, captions, questions, skip_bad)
        return lesson.describe()

    @app.get("/api/lessons/{id}")
    def lesson(id: str) -> dict[str, Any]:
        return service.lessons[id].describe()

    @app.post("/api/lessons/{id}/stop")
    def stop(id: str) -> dict[str, Any]:
        return service.lessons.stop(id).describe()

    @app.get("/show/report", response_class=HTMLResponse)
    def report(grid: str | None = None) -> str:
        with temporary_folder() as folder:
            return write_report(service.reported(grid), folder / "report.html").read_text("utf-8")

    @app.api_route("/api/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    def unknown(rest: str) -> JSONResponse:
        return JSONResponse({"error": "there is no such request: see docs/app.md"}, 404)

    return app


async def _known_fields(request: Request) -> None:
    """Refuse what a request does not read: a field or a parameter that it has not, and one of a kind given twice."""
    route = request.scope.get("route")
    if not (isinstance(route, APIRoute) and route.include_in_schema and route.path.startswith("/api/")):
        return
    form = await request.form() if request.method == "POST" else ()
    typed = [name for name, _ in form.multi_items()] if form else []
    asked = [name for name, _ in request.query_params.multi_items()]
    for given, fields in ((typed, route.dependant.body_params), (asked, route.dependant.query_params)):
        known = {each.alias: _is_list(each.field_info.annotation) for each in fields}
        for name in given:
            if name not in known:
                near = meant(name, known) or f"; there are: {', '.join(known) or 'none'}"
                raise ValueError(f"{printable(shortened(name, 80))!r} is not read by {route.path}{near}")
            if given.count(name) > 1 and not known[name]:
                raise ValueError(f"{name} is given {given.count(name)} times: keep one")


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(map(_is_list, get_args(hint)))


def _notes(lines: list[str]) -> dict[str, list[str]]:
    return {"notes": lines} if lines else {}


def _read(files: list[UploadFile] | None) -> list[tuple[str, bytes | Path]]:
    """Their names and bytes; the gate has limited how many there are."""
    return [(file.filename or "upload", file.file.read()) for file in files or ()]
