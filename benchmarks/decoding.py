"""Images decoded and prepared a second, against torchvision's DataLoader on the same files and cores, in turns.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --side 500 --images 600 --workers 2

JPEG files are drawn here: smooth shapes with noise, as large as photographs on the web. Both resize the shorter side to
256 with antialiasing, bicubic, crop 224 in the middle, and give batches of uint8. Wall time; the ratio is the median of
turns that change places, so what else the machine does meets both alike.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from perdure.backbones.preprocess import Preprocess
from perdure.streams.image_set import Budget, ImageSet
from perdure.streams.sources import Files

SIZE, RESIZE = 224, 256


def drawn(folder: Path, count: int, side: int) -> list[str]:
    """Names of JPEG files below `folder`, in one class folder as torchvision wants it."""
    random, names = np.random.default_rng(0), []
    (folder / "class").mkdir()
    for number in range(count):
        coarse = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + random.integers(-12, 12, smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
        names.append(f"class/{number}.jpg")
        Image.fromarray(noisy).save(folder / names[-1], quality=90)
    return names


def rate(batches: Callable[[], Iterator[Tensor]]) -> float:
    """Images a second."""
    start = time.perf_counter()
    count = sum(len(batch) for batch in batches())
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--side", type=int, default=375, help="shorter side of the files, in pixels")
    parser.add_argument("--workers", type=int, default=2, help="of the loader, and threads of perdure")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.workers)
    with tempfile.TemporaryDirectory() as folder:
        names = drawn(Path(folder), options.images, options.side)
        resize = v2.Resize(RESIZE, v2.InterpolationMode.BICUBIC, antialias=True)
        images = ImageFolder(folder, v2.Compose([resize, v2.CenterCrop(SIZE), v2.PILToTensor()]))
        loader = DataLoader(images, options.batch_size, num_workers=options.workers)
        data = ImageSet(
            Files(folder, names),
            torch.arange(len(names)),
            torch.zeros(len(names), dtype=torch.int64),
            Preprocess(SIZE, RESIZE),
            Budget(0),
        )

        def mine() -> Iterator[Tensor]:
            for start in range(0, len(names), options.batch_size):
                yield data.__getitems__(range(start, min(len(names), start + options.batch_size)))["image"]

        def theirs() -> Iterator[Tensor]:
            yield from (batch for batch, _ in loader)

        rates = []
        for turn in range(options.turns + 1):
            pair = {side: rate(side) for side in ((mine, theirs) if turn % 2 else (theirs, mine))}
            rates.append((pair[mine], pair[theirs]))
        own, other = (statistics.median(each) for each in zip(*rates[1:], strict=True))
        ratio = statistics.median(a / b for a, b in rates[1:])
        print(f"{own:.0f} images/s against {other:.0f} images/s of torchvision's DataLoader: {ratio:.2f}")


if __name__ == "__main__":
    main()
