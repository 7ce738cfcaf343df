"""Export as a graph without a library of models: ONNX, and a program of `torch.export`.

Its input `images` is uint8 (B, 3, S, S), resized and cropped as `labels.json` says; it normalises them itself. Its
output `scores` is float32 (B, classes).
"""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.adapters.injection import fold
from perdure.backbones.base import Backbone
from perdure.core.caching import FEATURES
from perdure.core.learner import Core
from perdure.core.objective import COSINES
from perdure.core.shared_copy import twin_of
from perdure.export.head import head_of
from perdure.formatting import counted

FILES: dict[str, str] = {"onnx": "model.onnx", "torch": "model.pt2"}


class Scores(nn.Module):
    """Images to scores, with all that was learnt in the weights.

    Args:
        learner: a copy that is nobody else's.
        whole: its backbone in float32 with all updates in the weights; None where it is in float32 itself.
    """

    def __init__(self, learner: Core, whole: Backbone | None) -> None:
        super().__init__()
        learner.cpu().eval()
        learner.prepare()
        if whole is None:
            fold(learner.backbone, branches=True)
        else:
            learner.backbone = whole
        learner.objective.refresh()
        self.learner = learner
        head = head_of(learner)
        # class names are the classifier: their embeddings stay what they are, and the text encoder is left out
        self.cosines = head.scores == COSINES
        self.weight, self.scale = (head.tensors.get(name) for name in ("weight", "logit_scale"))
        if self.cosines and hasattr(learner.objective, "embed"):
            self.weight = F.normalize(head.tensors["weight"].detach().cpu().float(), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images, uint8 (B, 3, S, S), to scores (B, classes)."""
        backbone, learner = self.learner.backbone, self.learner
        pixels = images.to(torch.float32)
        mean, std = (
            torch.tensor(each).view(1, 3, 1, 1) for each in (backbone.preprocess.mean, backbone.preprocess.std)
        )
        features = backbone.encode_pixels((pixels / 255 - mean) / std).float()
        if self.cosines and self.weight is not None:
            assert self.scale is not None
            cosines: Tensor = self.scale.detach().cpu() * F.normalize(features, dim=1) @ self.weight.T
            return cosines
        scores: Tensor = learner.method.predict(learner, {FEATURES: features})
        return scores


def write_graph(learner: Core, folder: Path, to: str, whole: Backbone | None = None) -> None:
    """Write `model.onnx` or `model.pt2` to `folder`, for batches of any size; see `Scores`.

    Raises:
        ValueError: when the learner learns no classes, a library is missing, or the model cannot be traced.
    """
    if "classes" not in learner.objective.asks or "conversations" in learner.objective.asks:
        raise ValueError(
            f"a graph gives scores of classes, and {learner.objective.name} learns none: export to 'merged'"
        )
    if to == "onnx":
        _check_onnx()
    side = learner.backbone.preprocess.size
    shown = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    with torch.no_grad():
        module = Scores(twin_of(learner), whole).eval()
        with _quiet():
            try:
                program: Any = torch.export.export(module, (shown,), dynamic_shapes=batch, strict=False)
                if to == "torch":
                    torch.export.save(program, folder / FILES[to])
                    return
                made = torch.onnx.export(
                    program, (shown,), input_names=["images"], output_names=["scores"], dynamo=True, verbose=False
                )
                assert made is not None
                made.save(folder / FILES[to], external_data=False)
            except (RuntimeError, torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.UserError) as error:
                reason = " ".join(str(error).split())[:160]
                raise ValueError(f"{learner.backbone.spec} cannot be traced ({reason}): export to 'merged'") from error


def _check_onnx() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise ValueError(f"onnx needs {missing[0]}: pip install 'perdure[onnx]'")


@contextlib.contextmanager
def _quiet() -> Any:
    """What exporters say on the way is meant for those who write them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def graph_readme(learner: Core, to: str, version: str) -> str:
    """The text of README.md."""
    side, classes = learner.backbone.preprocess.size, len(learner.objective.names)
    run = {
        "onnx": [
            "import onnxruntime",
            'session = onnxruntime.InferenceSession(folder + "/model.onnx")',
            'scores = session.run(None, {"images": pixels})[0]',
        ],
        "torch": [
            "import torch",
            'program = torch.export.load(folder + "/model.pt2").module()',
            "scores = program(torch.from_numpy(pixels)).detach().numpy()",
        ],
    }[to]
    code = [
        "import json",
        "from pathlib import Path",
        "import numpy as np",
        "from PIL import Image, ImageOps",
        'folder = "."  # where this file stands',
        'facts = json.loads(Path(folder, "labels.json").read_text(encoding="utf-8"))',
        '# facts["preprocess"] says how the model was taught to see; this is near',
        'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")',
        f"image = image.resize(({side}, {side}))",
        "pixels = np.asarray(image, np.uint8).transpose(2, 0, 1)[None]",
        *run,
        'print(facts["labels"][int(scores[0].argmax())])',
    ]
    return (
        f"# {counted(classes, 'class', 'classes')}, learnt in {counted(learner.learnt, 'task')}\n\n"
        f"Written by perdure {version}: {learner.backbone.spec} with what was learnt, as one graph. Images are uint8 "
        f"(B, 3, {side}, {side}); it normalises them itself.\n\n```python\n" + "\n".join(code) + "\n```\n"
    )
