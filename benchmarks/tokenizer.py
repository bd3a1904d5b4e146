"""DALL-E's dVAE beside the package dall_e, and what bf16 does to ids.

Run: python benchmarks/tokenizer.py                                       random weights; a minute on two cores
     python benchmarks/tokenizer.py --compile                             ours through torch.compile too
     python benchmarks/tokenizer.py --tokenizer PATH --data SHARDS        share of ids that a trained tokenizer gives alike in bf16 and fp32
     python benchmarks/tokenizer.py --help

Ways alternate within each round; printed are medians of images/s, and the median of the ratios within a round. Then the ids: where bf16
chooses another code than fp32, the two best must be nearer to each other in fp32 than twice the largest error of a logit in bf16.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from mimetic.data.opening import open_set
from mimetic.data.picture import in_unit_range
from mimetic.data.stream import ShardStream
from mimetic.data.views import ClassifyViews
from mimetic.tokenizers.dalle import DalleTokenizer
from mimetic.tokenizers.files import open_tokenizer
from mimetic.tokenizers.logit_laplace import map_pixels

GOALS = {"ratio": 2.0, "equal": 0.995}


def theirs_and_ours() -> tuple[nn.Module, DalleTokenizer]:
    """The published size with the same random weights."""
    import dall_e

    torch.manual_seed(0)
    theirs, ours = dall_e.Encoder().eval(), DalleTokenizer().eval().requires_grad_(False)
    renamed = {name.replace("weight", "w").replace("bias", "b"): p for name, p in ours.encoder.named_parameters()}
    for name, p in theirs.blocks.named_parameters():
        renamed[name].copy_(p)
    return theirs, ours


def speed(image_BCHW: torch.Tensor, rounds: int, compiled: bool) -> None:
    """Images/s of encoding, interleaved."""
    theirs, ours = theirs_and_ours()
    fast = in_bf16(ours)
    theirs, ours, fast = (module.to(image_BCHW.device) for module in (theirs, ours, fast))
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "dall_e fp32": lambda: theirs(map_pixels(image_BCHW)).argmax(1),
        "ours fp32": lambda: ours.encode(image_BCHW),
        "ours bf16": lambda: fast.encode(image_BCHW),
    }
    if compiled:
        encode = torch.compile(fast.encode, fullgraph=True)
        ways["ours bf16, compiled"] = lambda: encode(image_BCHW)
    alike = (ways["dall_e fp32"]() == ways["ours fp32"]()).double().mean()
    if alike < (0.99 if image_BCHW.is_cuda else 1):  # a GPU takes other kernels for other shapes, and random weights make many near ties
        raise SystemExit(f"{alike:.2%} of the ids in fp32 are alike: there is nothing to compare")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name in reversed(ways) if round_ % 2 else ways:
            started = time.perf_counter()
            ways[name]()
            if image_BCHW.is_cuda:
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                rates[name].append(len(image_BCHW) / (time.perf_counter() - started))
    device = torch.cuda.get_device_name() if image_BCHW.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{len(image_BCHW)} images of {image_BCHW.shape[-1]} pixels, {device}, {rounds} rounds; {alike:.2%} of ids alike in fp32")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates["dall_e fp32"], strict=True))
        goal = f" (goal {GOALS['ratio']:g})" if "bf16" in name else ""
        print(f"  {name:20} {statistics.median(values):8.2f} images/s  {ratio:6.2f} x dall_e fp32{goal}", flush=True)


@torch.no_grad()
def ties(image_BCHW: torch.Tensor) -> None:
    """Whether each id that bf16 changes was a near tie."""
    ours = theirs_and_ours()[1].to(image_BCHW.device)
    exact, rough = ours.logits(image_BCHW), in_bf16(ours).logits(image_BCHW)
    error = (rough - exact).abs().max()
    differs = exact.argmax(-1) != rough.argmax(-1)
    best = exact.topk(2).values
    gap = (best[..., 0] - best[..., 1])[differs]
    beyond = int((gap >= 2 * error).sum())
    widest = gap.max().item() if len(gap) else 0.0
    print(f"random weights, {differs.numel():,} cells: {1 - differs.float().mean():.2%} of ids equal; a logit in bf16 is off by at most "
          f"{error:.2g} (deviation {exact.std():.2g}); where ids differ, the two best codes lie at most {widest:.2g} apart, {beyond} of "
          f"{len(gap)} at twice the error or beyond", flush=True)  # fmt: skip
    if beyond:
        raise SystemExit("bf16 changes ids that were no near ties")


def trained(path: str, data: str, images: int, side: int, device: str) -> None:
    """Share of equal ids on real images."""
    exact, fast = (open_tokenizer(path, precision).to(device) for precision in ("fp32", "bf16"))  # type: ignore[attr-defined]
    equal = cells = 0
    for batch in ShardStream(open_set(data), 32, shuffle=False, transform=ClassifyViews(side, None)).run(-(-images // 32)):
        image_BCHW = in_unit_range(batch["image"][batch["valid"]]).to(device)
        same = exact.encode(image_BCHW) == fast.encode(image_BCHW)
        equal, cells = equal + int(same.sum()), cells + same.numel()
    print(f"{path} on {data}, {side} pixels: {equal / cells:.2%} of {cells:,} ids equal in bf16 and fp32 (goal {GOALS['equal']:.1%})")


def in_bf16(ours: DalleTokenizer) -> DalleTokenizer:
    """A copy."""
    fast = copy.deepcopy(ours)
    fast.encode_in(torch.bfloat16)
    return fast


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=112, help="pixels")
    parser.add_argument("--compile", action="store_true", help="ours in bf16 through torch.compile too")
    parser.add_argument("--tokenizer", metavar="PATH", help="a trained tokenizer: its ids in bf16 and fp32, instead of all else")
    parser.add_argument("--data", metavar="SHARDS", help="its images")
    parser.add_argument("--images", type=int, default=512, help="of --data, at most")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.tokenizer:
        if not given.data:
            raise SystemExit("--tokenizer needs --data")
        trained(given.tokenizer, given.data, given.images, given.side, device)
        return
    torch.manual_seed(1)
    image_BCHW = torch.rand(given.batch, 3, given.side, given.side, device=device)
    with torch.no_grad():
        speed(image_BCHW, given.rounds, given.compile)
        ties(image_BCHW)


if __name__ == "__main__":
    main()
