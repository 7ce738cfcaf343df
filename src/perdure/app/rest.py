"""The HTTP interface for programs: /api/..., JSON in every answer. docs/app.md has a curl line for each."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse

from perdure.app.service import Service
from perdure.app.uploads import looked_at
from perdure.formatting import printable
from perdure.reporting.report import write_report

_MANY = Annotated[list[UploadFile], File()]


def interface(service: Service) -> FastAPI:
    """The application that answers /api/... and shows reports."""
    app = FastAPI(title="perdure", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")

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
        return [
            {"image": image.filename, "labels": [{"name": name, "score": score} for name, score in answer]}
            for image, answer in zip(images, found, strict=True)
        ]

    @app.get("/api/search")
    def search(text: str, top: int = 12) -> list[dict[str, Any]]:
        return [{"image": each.name, "cosine": each.cosine} for each in service.search(text, top)]

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
        with tempfile.NamedTemporaryFile(prefix="perdure-", suffix=".zip") as packed:
            given = None
            if archive is not None:
                while chunk := archive.file.read(1 << 20):
                    packed.write(chunk)
                packed.flush()
                given = archive.filename or "photos.zip", Path(packed.name)
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
        with tempfile.TemporaryDirectory(prefix="perdure-") as folder:
            return write_report(service.reported(grid), Path(folder) / "report.html").read_text("utf-8")

    @app.api_route("/api/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
    def unknown(rest: str) -> JSONResponse:
        return JSONResponse({"error": "there is no such request: see docs/app.md"}, 404)

    return app


def _read(files: list[UploadFile] | None) -> list[tuple[str, bytes | Path]]:
    """Their names and bytes; the gate has limited how many there are."""
    return [(file.filename or "upload", file.file.read()) for file in files or ()]
