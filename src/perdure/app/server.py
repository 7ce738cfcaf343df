"""The app as a server: page and HTTP interface behind one gate."""

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp

from perdure.app.gate import Gate
from perdure.app.service import Service
from perdure.storage.files import temporary_folder

_BACKLOG = 128


def serve(service: Service, host: str, port: int, token: str, ready: Callable[[str], None]) -> None:
    """Answer until interrupted.

    Args:
        service: what answers.
        host: to listen on.
        port: to listen on; 0 takes a free one.
        token: for uploads and lessons; see `Gate`.
        ready: is told the address.

    Raises:
        ValueError: when the port is taken, or the host is none of this machine.
    """
    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened on ({error.strerror}): give another --port or --host"
        ) from error
    with listening, temporary_folder("perdure-app-") as folder:
        app = application(service, host, token, folder)
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listening.getsockname()[1]}")
        settings = uvicorn.Config(app, log_level=logging.WARNING, timeout_graceful_shutdown=1, server_header=False)
        uvicorn.Server(settings).run([listening])


def application(service: Service, host: str, token: str, folder: Path) -> ASGIApp:
    """What a server runs.

    Args:
        service: what answers.
        host: that it will listen on.
        token: for uploads and lessons.
        folder: for what browsers upload; the caller removes it.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when something is uploaded
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import gradio as gr

    from perdure.app.drawing import STYLE
    from perdure.app.pages import WORDS, Page
    from perdure.app.rest import interface

    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # those of Gradio come from elsewhere
    app = interface(service)
    gate = Gate(app, host, token, service.limits.upload)
    gr.mount_gradio_app(
        app,
        Page(service, gate).build(),
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        max_file_size=service.limits.upload,
        i18n=WORDS,
        css=STYLE,
        theme=gr.themes.Default(font=fonts[0], font_mono=fonts[1]),
    )
    return gate
