"""The `mimetic` command: doors to the modules that do the work, no logic."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mimetic.engine.config import did_you_mean
from mimetic.engine.errors import SettingError
from mimetic.engine.runtime import run_entry

COMMANDS = ("demo", "pack", "index", "check", "tokenizer", "doctor", "tokens", "watch", "export", "compare", "models", "attention",
            "replay")  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Answers mistakes in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises what `run_entry` prints."""
        raise SettingError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """All commands; each `--help` ends with an example."""
    top = Parser(prog="mimetic", description="Masked image modeling on your own images, from shards to an exported backbone.",
                 epilog="example: mimetic pack photos/ shards/photos")  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    demo = commands.add_parser("demo", help="the whole pipeline on Fashion-MNIST, ending in one page",
                               epilog="example: mimetic demo --out runs/demo")  # fmt: skip
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything goes (default: %(default)s)")
    demo.add_argument("--budget", choices=("full", "small"), default="full", help="small is a quick look, its numbers mean little")

    pack = commands.add_parser("pack", help="images into WebDataset shards with an index",
                               epilog="example: mimetic pack photos/ shards/photos")  # fmt: skip
    pack.add_argument("source", type=Path, metavar="SRC", help="a folder of images (sub-folders are classes), a .csv, .tsv or .jsonl "
                      "with a column `path` (and perhaps `label`, `key`), tars, or an idx file")  # fmt: skip
    pack.add_argument("out", type=Path, metavar="OUT", help="the folder of the shards")
    pack.add_argument("--samples-per-shard", type=int, metavar="N", help="(default: 8192, or about 256 MiB)")
    pack.add_argument("--short-side", type=int, metavar="PIXELS", help="make larger images so small (default: bytes stay as they are)")
    pack.add_argument("--format", choices=("jpeg", "png", "webp"), help="encode images so (default: bytes stay as they are)")
    pack.add_argument("--quality", type=int, metavar="Q", help="1 to 100, of JPEG and WebP that are encoded anew (default: 90)")
    pack.add_argument("--dedup", action="store_true", help="leave out images whose bytes are those of an earlier one")
    pack.add_argument("--val", type=float, metavar="SHARE", help="split into OUT/train and OUT/val, for good: by each image's key")
    _add_shared(pack)

    index = commands.add_parser("index", help="an index for tars that exist",
                                epilog="example: mimetic index 'laion/{00000..00099}.tar'")  # fmt: skip
    index.add_argument("shards", nargs="+", metavar="SHARDS", help="tars, folders of tars, patterns, ranges, or addresses")
    index.add_argument("--out", type=Path, metavar="FOLDER", help="where the index goes (default: the folder of the shards)")
    _add_shared(index)

    check = commands.add_parser("check", help="whether shards are what their index says and every image decodes",
                                epilog="example: mimetic check shards/photos")  # fmt: skip
    check.add_argument("path", metavar="SHARDS", help="an index.json, its folder, or the address of either")
    check.add_argument("--out", type=Path, metavar="FILE", help="write all faults there: shard, key, reason")
    _add_workers(check)

    _add_tokenizer_commands(commands)

    watch = commands.add_parser("watch", help="a run in the terminal, while it goes on: speed, time left, curves, events",
                                epilog="example: mimetic watch runs/beit")  # fmt: skip
    watch.add_argument("run", metavar="RUN", help="a run folder, or the address of one")
    watch.add_argument("--once", action="store_true", help="print it once, as is done where the output is no terminal")
    watch.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between looks (default: %(default)s)")

    export = commands.add_parser("export", help="the backbone of a run or of a checkpoint, checked as it is written",
                                 epilog="example: mimetic export runs/beit exported/beit --to timm")  # fmt: skip
    export.add_argument("run", type=Path, metavar="RUN", help="a run, finished or not, or one of its checkpoints")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    export.add_argument("--to", choices=("safetensors", "timm"), default="safetensors",
                        help="both write timm's schema; timm also opens it there and compares (default: %(default)s)")  # fmt: skip

    compare = commands.add_parser("compare", help="one page from runs that exist",
                                  epilog="example: mimetic compare runs/scratch runs/fine-tuned --out report")  # fmt: skip
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    compare.add_argument("--out", type=Path, required=True, metavar="DIR", help="where report.html, report.md and pictures go")

    models = commands.add_parser("models", help="every backbone: parameters and multiply-adds beside the papers'",
                                 epilog="example: mimetic models 'swin*224'")  # fmt: skip
    models.add_argument("pattern", nargs="?", default="*", metavar="NAME", help="names to show, with * and ? (default: all)")

    replay = commands.add_parser("replay", help="a bad step once more, alone, to see where its numbers went wrong",
                                 epilog="example: mimetic replay runs/beit/capsules/step-00000123")  # fmt: skip
    replay.add_argument("capsule", type=Path, metavar="CAPSULE", help="a folder of RUN/capsules")
    replay.add_argument("--process", type=int, metavar="N", help="whose batches (default: the first whose loss is not finite, else 0)")

    attention = commands.add_parser("attention", help="where a backbone looks, as a picture",
                                    epilog="example: mimetic attention runs/beit photo.jpg --out attention.png")  # fmt: skip
    attention.add_argument("run", metavar="RUN", help="a finished run, or an exported folder")
    attention.add_argument("image", type=Path, metavar="IMAGE", help="a picture")
    attention.add_argument("--out", type=Path, default=Path("attention.png"), metavar="PNG", help="(default: %(default)s)")
    attention.add_argument("--fuse", choices=("mean", "max", "min"), default="mean", help="how heads are fused (default: %(default)s)")
    attention.add_argument("--discard", type=float, default=0.9, metavar="SHARE",
                           help="share of the lowest attention left out in the second rollout (default: %(default)s)")  # fmt: skip
    attention.add_argument("--cell", type=int, nargs=2, metavar=("ROW", "COLUMN"),
                           help="whose view is shown (default: [CLS], or the mean of all patches, or the middle of the map)")  # fmt: skip
    _add_range(attention)
    return top


def _add_tokenizer_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    tokenizer = commands.add_parser("tokenizer", help="image tokenizers from elsewhere",
                                    epilog="example: mimetic tokenizer import encoder.pkl tokenizers/dalle")  # fmt: skip
    verbs = tokenizer.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
    importing = verbs.add_parser("import", help="DALL-E's dVAE from a file of OpenAI's or of transformers' FLAVA",
                                 epilog="example: mimetic tokenizer import encoder.pkl tokenizers/dalle")  # fmt: skip
    importing.add_argument("file", type=Path, metavar="FILE", help="OpenAI's encoder.pkl, a FLAVA checkpoint or its folder, or safetensors "
                           "with the names of the package dall_e; no code in it is run")  # fmt: skip
    importing.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    importing.add_argument("--decoder", type=Path, metavar="FILE", help="(default: the decoder.pkl beside an encoder.pkl)")

    tokens = commands.add_parser("tokens", help="the tokens of N views of each image, made once for many trainings", allow_abbrev=False,
                                 epilog="example: mimetic tokens runs/tokenizer shards/photos shards/photos-tokens --views 4 "
                                 "--config launch/recipes/beit_base_in1k.yaml")  # fmt: skip
    tokens.add_argument("tokenizer", metavar="TOKENIZER", help="a tokenizer's folder, or the run that trained it")
    tokens.add_argument("shards", metavar="SHARDS", help="the images: an index.json, its folder, or the address of either")
    tokens.add_argument("out", type=Path, metavar="OUT", help="the folder of the tokens; with a larger N, views are added to it")
    tokens.add_argument("--views", type=int, required=True, metavar="N", help="views of each image: epochs until they come again")
    tokens.add_argument("--config", type=Path, required=True, metavar="RECIPE", help="of the pretraining that will read them, for views "
                        "and seed; further settings may follow, --a.b VALUE")  # fmt: skip
    tokens.add_argument("--batch-size", type=int, metavar="B", help="images that the tokenizer gets at a time (default: data.batch_size)")
    _add_workers(tokens)

    doctor = commands.add_parser("doctor", help="whether a tokenizer is fit to teach on these images: healthy, coarse, collapsed or blind",
                                 epilog="example: mimetic doctor runs/tokenizer shards/held-out --out doctor")  # fmt: skip
    doctor.add_argument("tokenizer", metavar="TOKENIZER", help="a tokenizer's folder, or the run that trained it")
    doctor.add_argument("shards", metavar="SHARDS", help="images that it did not learn from: an index.json, its folder, or tars")
    doctor.add_argument("--out", type=Path, metavar="DIR", help="write pictures, doctor.md and doctor.json there")
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write all figures, thresholds and the verdict there")
    doctor.add_argument("--images", type=int, default=512, metavar="N", help="images to look at (default: %(default)s)")
    doctor.add_argument("--image-size", type=int, metavar="PIXELS",
                        help="their side (default: what the tokenizer was trained at, or else what fits them)")  # fmt: skip


def _add_shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE",
                         help="share of unreadable images that is tolerated (default: %(default)s; 0 is strict)")  # fmt: skip
    command.add_argument("--channels", type=int, metavar="C",
                         help="channels of every image (default: 3 if any is coloured, else 1; an array's own number)")  # fmt: skip
    _add_range(command)
    _add_workers(command)


def _add_range(command: argparse.ArgumentParser) -> None:
    command.add_argument("--range", type=float, nargs=2, metavar=("LOW", "HIGH"),
                         help="pixel values that become 0 and 1, of 16-bit or float images (default: 8 bits)")  # fmt: skip


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one a CPU)")


def dispatch() -> None:
    """Parses the command line and opens the door."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if not first.startswith("-") and first not in COMMANDS:
        raise SettingError(f"unknown command {first}{did_you_mean(first, COMMANDS)}; mimetic --help lists them")
    arguments, settings = parser().parse_known_args(sys.argv[1:] or ["--help"])
    if settings and arguments.command != "tokens":
        raise SettingError(f"unrecognized arguments: {' '.join(settings)}; see mimetic --help")
    if arguments.command == "tokens":
        from mimetic.pretrain.tokens import cache_tokens

        options = {name: value for name, value in vars(arguments).items() if name != "command"}
        cache_tokens(**options, settings=settings)
    elif arguments.command == "demo":
        from mimetic.demo import demo

        demo(arguments.out, arguments.budget)
    elif arguments.command in ("pack", "index", "check"):
        from mimetic.data.packing import telling
        from mimetic.data.packing.workers import count_of

        options = vars(arguments) | {"workers": count_of(arguments.workers)}
        tell: dict[str, Callable[..., None]] = {
            "pack": telling.pack_and_tell, "index": telling.index_and_tell, "check": telling.check_and_tell,
        }  # fmt: skip
        tell[options.pop("command")](**options)
    elif arguments.command == "doctor":
        from mimetic.tokenizers.examination import examine

        examine(arguments.tokenizer, arguments.shards, arguments.out, arguments.images, arguments.image_size, arguments.json)
    elif arguments.command == "watch":
        from mimetic.report.watch import watch

        watch(arguments.run, arguments.once, arguments.every)
    elif arguments.command == "export":
        from mimetic.export.backbone import export_backbone

        export_backbone(arguments.run, arguments.out, arguments.to)
    elif arguments.command == "models":
        from mimetic.report.models import print_models

        print_models(arguments.pattern)
    elif arguments.command == "replay":
        from mimetic.replay import replay

        if not replay(arguments.capsule, arguments.process):
            sys.exit(1)
    elif arguments.command == "tokenizer":
        from mimetic.tokenizers.importing import import_tokenizer

        import_tokenizer(arguments.file, arguments.out, arguments.decoder)
    elif arguments.command == "attention":
        from mimetic.report.attention import draw_attention

        cell = tuple(arguments.cell) if arguments.cell else None
        draw_attention(arguments.run, arguments.image, arguments.out, fuse=arguments.fuse, discard=arguments.discard, cell=cell,
                       range=arguments.range)  # fmt: skip
    else:
        from mimetic.report.compare import compare

        print(f"report in {compare(arguments.runs, arguments.out)}")


def main() -> None:
    """Entry point of `mimetic`."""
    run_entry(dispatch)


if __name__ == "__main__":
    main()
