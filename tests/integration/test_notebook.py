"""A notebook shows what a terminal shows."""

from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

CELL = """
import torch
from perdure import Learner, Screen

images = torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8)
learner = Learner.create("tiny()", "lora(rank=2)", epochs=3, batch_size=4)
screen = Screen(verbose=True)
learner.learn(images, ["cat", "dog"] * 4, progress=screen)
screen.close()
learner
"""


@pytest.mark.filterwarnings("ignore")  # of the kernel's own libraries
def test_a_notebook_shows_the_bar_the_epochs_and_the_learner_in_one_line() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=240, startup_timeout=240, kernel_name="python3").execute()
    outputs: list[Any] = notebook.cells[0].outputs
    assert [each for each in outputs if each.output_type == "error"] == []
    shown = " ".join(str(each.get("data", each.get("text"))) for each in outputs)
    assert "epoch 3/3" in shown
    assert outputs[-1].data["text/plain"] == "Learner(tiny(), lora(rank=2); 1 task, 2 classes)"
