"""Every family beside timm's net of the same name: forward, and forward with backward, interleaved in one run.

Prints medians of images/s, the median of the rounds' ratios (ours / timm's), and the peak memory of a training step of each in a process
of its own.

Run: python benchmarks/backbones.py [--only swin ...] [--rounds 9] [--threads 2] [--batch 8]
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

NAMES = ("vit_small_patch16_224", "deit_small_distilled_patch16_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224",
         "swinv2_tiny_window8_256", "poolformer_s12", "twins_pcpvt_small", "twins_svt_small", "maxvit_tiny_tf_224", "mixer_b16_224",
         "resmlp_12_224", "gmlp_s16_224")  # fmt: skip
WANTED = {"swin_tiny_patch4_window7_224": 1.2, "swinv2_tiny_window8_256": 1.2}
LEAST = 0.97


def build(name: str, whose: str) -> nn.Module:
    """The net, in training mode without drop path."""
    import timm

    from mimetic.backbones.catalog import create_backbone

    return (create_backbone(name, 1000) if whose == "ours" else timm.create_model(name, num_classes=1000)).train()


def step(net: nn.Module, image_BCHW: torch.Tensor, bf16: bool, backward: bool) -> None:
    with torch.set_grad_enabled(backward), torch.autocast(image_BCHW.device.type, torch.bfloat16, enabled=bf16):
        logits = net(image_BCHW)
    if backward:
        logits.float().square().mean().backward()
        net.zero_grad()
    if image_BCHW.is_cuda:
        torch.cuda.synchronize()


def seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak(name: str, whose: str, bf16: bool, batch: int) -> float:
    """MB that a training step adds, in this process."""
    net, image = build(name, whose), picture(name, batch)
    if image.is_cuda:
        net.cuda()
        step(net, image, bf16, True)
        return torch.cuda.max_memory_allocated() / 1e6
    step(net, image[:1], bf16, True)
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the highest mark
    before = resident("VmRSS")
    step(net, image, bf16, True)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MB of this process, now or at the highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1e3


def picture(name: str, batch: int) -> torch.Tensor:
    from mimetic.backbones.catalog import CATALOG

    side = CATALOG[name].image_size
    return torch.randn(batch, 3, side, side, device="cuda" if torch.cuda.is_available() else "cpu")


def peak_elsewhere(*arguments: object) -> float:
    """`peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare(name: str, bf16: bool, backward: bool, rounds: int, batch: int) -> float:
    """Prints one line, returns the ratio."""
    image = picture(name, batch)
    nets = {whose: build(name, whose).to(image.device) for whose in ("ours", "timm")}
    took: dict[str, list[float]] = {whose: [] for whose in nets}
    for round_ in range(rounds + 1):
        for whose in reversed(nets) if round_ % 2 else nets:
            spent = seconds(partial(step, nets[whose], image, bf16, backward))
            if round_:  # the first one warms up
                took[whose].append(spent)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(took["ours"], took["timm"], strict=True))
    rates = " ".join(f"{batch / statistics.median(values):9.1f}" for values in took.values())
    wanted = WANTED.get(name, LEAST)
    kind = f"{'bf16' if bf16 else 'fp32'} {'forward+backward' if backward else 'forward'}"
    memory = ""
    if backward:
        memory = "  " + " ".join(f"{peak_elsewhere(name, whose, int(bf16), batch):7.0f}" for whose in nets)
    print(f"{name:34} {kind:22} {rates} {ratio:7.2f} {'' if ratio >= wanted else f'below {wanted}':11}{memory}", flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description="Backbones beside timm's.")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        name, whose, bf16, batch = arguments.peak
        print(peak(name, whose, bool(int(bf16)), int(batch)))
        return
    names = [name for name in NAMES if any(part in name for part in arguments.only)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {arguments.threads} threads"
    print(f"{len(names)} backbones, batch {arguments.batch}, {arguments.rounds} rounds, {device}; peak: MB that a training step adds")
    print(f"{'':57} {'images/s':^19} {'ratio':>7} {'':11}  {'peak':^15}\n{'':57} {'ours':>9} {'timm':>9} {'':19}  {'ours':>7} {'timm':>7}")
    ratios = [compare(name, bf16, backward, arguments.rounds, arguments.batch)
              for name in names for bf16 in (False, True) for backward in (False, True)]  # fmt: skip
    print(f"least ratio {min(ratios):.2f}, median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
