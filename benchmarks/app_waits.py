"""How long clients of the app wait while a task is taught, in training steps: 8 clients, 50 requests.

    python benchmarks/app_waits.py --backbone 'pocket()'

Timed against each other in one process, so what else the machine does falls on both. The process needs the extra `app`.
"""

import argparse
import asyncio
import io
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from torch import Tensor

from perdure.app.lessons import Lesson
from perdure.app.server import application
from perdure.app.service import Service
from perdure.training.config import RunConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
CLIENTS, REQUESTS, PER_CLASS = 8, 50, 20


def picture(colour: str, seed: int) -> bytes:
    """A noisy picture of a colour, as PNG."""
    noisy = np.array(COLOURS[colour]) + np.random.default_rng(seed).normal(0, 12, (96, 96, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Print waits and steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="pocket()")
    backbone = parser.parse_args().backbone
    import uvicorn

    steps: list[float] = []
    told = Lesson.step

    def timed(self: Lesson, step: int, loss: Tensor, images: int) -> None:
        float(loss)
        steps.append(time.perf_counter())
        told(self, step, loss, images)

    Lesson.step = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        given = {"backbone": backbone}
        service = Service(folder / "learner", RunConfig(stream="", backbone=backbone), given, folder / "uploads")
        server = uvicorn.Server(
            uvicorn.Config(application(service, "127.0.0.1", "", folder), port=0, log_level="error")
        )
        threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True).start()
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, trust_env=False)

        def teach(*colours: str) -> str:
            shown = [(c, [(f"{i}.png", picture(c, i)) for i in range(PER_CLASS)]) for c in colours]
            return service.give(shown).id

        def ended(lesson: str) -> None:
            while not service.lessons[lesson].over:
                time.sleep(0.1)
            assert service.lessons[lesson].state == "learnt", service.lessons[lesson].said

        def ask(i: int) -> float:
            colour = ("red", "green")[i % 2]
            file = [("images", ("a.png", picture(colour, 1000 + i)))]
            start = time.perf_counter()
            answer = client.post("/api/predict", files=file)
            assert answer.json()[0]["labels"][0]["name"] == colour, answer.text
            return time.perf_counter() - start

        ended(teach("red", "green"))
        alone = sorted(map(ask, range(10)))
        steps.clear()
        lesson = teach("blue", "white")
        while len(steps) < 3:
            time.sleep(0.01)
        with ThreadPoolExecutor(CLIENTS) as clients:
            waits = sorted(clients.map(ask, range(REQUESTS)))
        last, during = service.lessons[lesson].state, len(steps)
        ended(lesson)
        lasted = np.diff(steps[:during])
        server.should_exit = True
    print(f"{backbone}: one client, nothing taught: median {alone[5]:.3f} s")
    print(f"while taught ({last}): median {waits[len(waits) // 2]:.3f} s, longest {waits[-1]:.3f} s")
    print(f"a step: median {np.median(lasted):.3f} s, mean {lasted.mean():.3f} s ({during} steps)")
    print(f"longest wait: {waits[-1] / np.median(lasted):.2f} median steps, {waits[-1] / lasted.mean():.2f} mean steps")


if __name__ == "__main__":
    main()
