"""Training steps with eager and with sdpa attention on this machine: what `--attention auto` goes by on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/attention.py --dtype fp32
    OMP_NUM_THREADS=1 python benchmarks/attention.py --dtype both

A block's attention and MLP of a ViT at several numbers of tokens and widths, forward and backward through three blocks
as when adapters are trained (frozen weights, a gradient on the input). The two take turns in one process; what counts
is CPU time, the least of all turns. Prints eager's time over sdpa's: above 1 sdpa is faster. With `--dtype both` the
better of the two in bfloat16 over the better in float32: above 1 float32 is faster, which `--precision auto` goes by.
"""

import argparse
import time

import timm
import torch

SHAPES = ((192, 3), (384, 6), (768, 12))
"""Width and heads: ViT-Ti, -S and -B."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def seconds(model: torch.nn.Module, x: torch.Tensor, fused: bool) -> float:
    for block in model:
        block.attn.fused_attn = fused
    start = time.process_time()
    model(x).float().sum().backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "both"), default="fp32")
    parser.add_argument("--tokens", type=int, nargs="+", default=(17, 50, 65, 101, 197, 257, 577))
    parser.add_argument("--rows", type=int, default=2048, help="tokens in a batch, over the tokens of an image")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    names = ("fp32", "bf16") if options.dtype == "both" else (options.dtype,)
    ratio = "bf16 / fp32" if options.dtype == "both" else f"eager / sdpa, {options.dtype}"
    print(f"{ratio}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print("tokens", *(f"{width:>7}" for width, _ in SHAPES))
    for tokens in options.tokens:
        ratios = []
        for width, heads in SHAPES:
            blocks = [timm.models.vision_transformer.Block(width, heads) for _ in range(3)]
            model = torch.nn.Sequential(*blocks).requires_grad_(False)
            x = torch.randn(max(1, options.rows // tokens), tokens, width)
            least: dict[tuple[str, bool], float] = {}
            for turn in range(options.turns + 1):
                for name in names:
                    model.to(DTYPES[name])
                    given = x.to(DTYPES[name]).requires_grad_()
                    for fused in (False, True):
                        took = seconds(model, given, fused)
                        if turn:
                            least[name, fused] = min(took, least.get((name, fused), took))
            if options.dtype == "both":
                fp32, bf16 = (min(least[name, False], least[name, True]) for name in names)
                ratios.append(bf16 / fp32)
            else:
                ratios.append(least[options.dtype, False] / least[options.dtype, True])
        print(f"{tokens:>6}", *(f"{ratio:>7.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
