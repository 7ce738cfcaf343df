"""How many images second moments need, and in which precision the encoder may run while they are taken.

    python benchmarks/moments.py --data ../shared/data/cifar100

For one task (10 classes, 1,000 images) the subspaces from a part of the images are compared with those from all of them
in float32: `lost` is the share of the top directions' energy that a subset's directions miss (design of B_t, rank 10),
`leak` the share of the task's energy outside the space that DualGPM takes minus the share allowed (1 - keep).
"""

import argparse

import torch

from perdure.mechanisms.moments import second_moments
from perdure.mechanisms.subspace import Subspace
from perdure.streams import build_stream
from perdure.training.config import make_backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data/cifar100")
    parser.add_argument("--keep", type=float, default=0.95)
    options = parser.parse_args()
    backbone = make_backbone("pocket()").eval()
    stream = f'parquet(path="{options.data}", label="fine_label", tasks=10, per_class=100)'
    data = build_stream(stream, backbone.preprocess, 0).tasks[0].train
    layers = {k: backbone.get_submodule(s[0].layer) for k, s in backbone.sites_by_input("kv").items()}
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()

    def moments(count: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        backbone.to(dtype)
        batches = (data.__getitems__(order[i : min(i + 64, count)]) for i in range(0, count, 64))
        return second_moments(backbone, layers, batches)

    truth = moments(len(data), torch.float32)
    print(f"{'images':>7} {'encoder':>9} {'lost, mean':>11} {'lost, worst':>12} {'leak, worst':>12}")
    for dtype in (torch.float32, torch.bfloat16):
        for count in (32, 64, 128, 256, 512, len(data)):
            part = {name: each @ each for name, each in moments(count, dtype).items()}
            lost, leak = [], []
            for name, whole in truth.items():
                space, square = Subspace.empty(len(whole)), whole @ whole
                best, rows = space.design(square, 10), space.design(part[name], 10)
                held = torch.trace(rows @ whole @ rows.T) / torch.trace(best @ whole @ best.T)
                lost.append(1 - held.item())
                outside = space.take(part[name], options.keep).project(square).trace()
                leak.append((outside / square.trace()).item() - (1 - options.keep))
            name = str(dtype).removeprefix("torch.")
            print(
                f"{count:>7} {name:>9} {sum(lost) / len(lost):>11.5f} {max(lost):>12.5f} {max(leak):>12.5f}", flush=True
            )
        backbone = make_backbone("pocket()").eval()
        layers = {k: backbone.get_submodule(s[0].layer) for k, s in backbone.sites_by_input("kv").items()}


if __name__ == "__main__":
    main()
