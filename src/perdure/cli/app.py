"""The command that opens the page in the browser.

What it serves with is imported when it is called: its help waits for no torch.
"""

import os
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from perdure.cli.console import Screen
from perdure.cli.use import LearnerCommand
from perdure.formatting import count_bytes
from perdure.options.ranges import Range, Seed
from perdure.training.config import RunConfig
from perdure.training.defaults import for_lessons


@dataclass(frozen=True, kw_only=True)
class App(LearnerCommand):
    """A page in the browser, offline: predict, search, ask, teach, compare; with an HTTP interface."""

    learner: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LEARNER")] = Path("my.learner")
    """A learner's folder; it is made when the first lesson is taught."""
    images: Path | None = None
    """Folder of images to search in."""
    runs: Path | None = None
    """Folder of grids that perdure compare wrote, to look at."""
    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0 lets other machines in, and then uploads and lessons need --token."""
    port: Annotated[int, Range(0, 65535)] = 7860
    """Where to listen; 0 takes a free one."""
    token: str = ""
    """What uploads and lessons ask for; the variable PERDURE_TOKEN, which no list of processes shows, does the same."""
    uploads: Path | None = None
    """Folder for pictures that are taught; LEARNER-uploads unless said otherwise."""
    max_upload: str = "200MB"
    """Most of what is uploaded at once; what an archive unpacks to may be ten times that."""
    backbone: str | None = None
    """For a new learner; pocket() unless said otherwise."""
    method: str | None = None
    """For a new learner; as of perdure learn."""
    objective: str | None = None
    """For a new learner; as of perdure learn."""
    seed: Seed | None = None
    """For a new learner; 0 unless said otherwise."""

    def __call__(self, screen: Screen) -> None:
        """Serve until interrupted."""
        if find_spec("gradio") is None:
            raise ValueError("the app needs Gradio, which is not installed: pip install 'perdure[app]'")
        most = count_bytes(self.max_upload, "--max-upload ")
        token = self.token or os.environ.get("PERDURE_TOKEN", "")
        screen.wait("reading the model")
        from perdure.app.server import serve
        from perdure.app.service import Service
        from perdure.app.uploads import Limits

        names = [f.name for f in fields(RunConfig) if hasattr(self, f.name)]
        given = {n: v for n in names if (v := getattr(self, n)) is not None and n != "device"}
        config = RunConfig(stream="", **for_lessons(self.backbone or RunConfig.backbone, self.objective) | given)
        if self.device:
            given["device"] = self.device
        service = Service(
            self.learner,
            config,
            given,
            self.uploads or self.learner.absolute().with_name(f"{self.learner.absolute().name}-uploads"),
            Limits(upload=most, unpacked=10 * most),
            self.images,
            self.runs,
            self.device,
        )

        def ready(address: str) -> None:
            screen.result({"event": "ready", "address": address}, f"open {address} in a browser; Ctrl-C ends it")

        serve(service, self.host, self.port, token, ready)
