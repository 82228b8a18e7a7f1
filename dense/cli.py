"""The published commands of segmentation and detection: train.py and test.py of both folders call train() and test()
here.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from training.options import Parser

# isort: split
import torch
import torch.distributed

from dense import libraries
from training import files
from training.errors import UserError, one_line
from utils import environment, is_main_process, keep_freed_memory, process_group

METRICS = {
    "mmseg": ["mIoU", "mDice", "mFscore"],
    "mmdet": ["mAP", "bbox", "segm", "proposal", "proposal_fast"],
}


def shared_options(parser: Parser) -> None:
    parser.add_argument("config", help="a config file")
    parser.add_argument(
        "--work-dir", metavar="FOLDER", help="where everything is written (work_dirs/NAME OF THE CONFIG)"
    )
    for name in ("--options", "--cfg-options"):
        parser.add_argument(
            name,
            nargs="+",
            default=[],
            metavar="KEY=VALUE",
            help="set values of the config, as model.backbone.pad=zero",
        )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes (%(default)s)",
    )
    parser.add_argument("--local_rank", type=int, default=0, help="ignored: launchers tell it through the environment")


def train_parser() -> Parser:
    parser = Parser(description="Train on a config.")
    shared_options(parser)
    parser.add_argument("--resume-from", metavar="FILE", help="go on with the training that wrote this checkpoint")
    parser.add_argument("--load-from", metavar="FILE", help="start a new training from the weights of this checkpoint")
    parser.add_argument("--no-validate", action="store_true", help="no scores during the training")
    parser.add_argument("--seed", type=int, help="(drawn, and written to the log)")
    parser.add_argument("--deterministic", action="store_true", help="the same bits each time on a GPU, at some cost")
    parser.add_argument("--gpus", help="refused: start that many processes with dist_train.sh")
    parser.add_argument("--gpu-ids", nargs="+", help="refused: name GPUs with CUDA_VISIBLE_DEVICES")
    return parser


def test_parser(library: str) -> Parser:
    parser = Parser(description="Score a checkpoint.")
    shared_options(parser)
    parser.add_argument("checkpoint", help="the weights of a segmentor or a detector")
    parser.add_argument(
        "--eval",
        nargs="+",
        choices=METRICS[library],
        metavar="NAME",
        help=f"scores: {', '.join(METRICS[library])} (the config's)",
    )
    parser.add_argument(
        "--aug-test", action="store_true", help="segmentation: the mean over six sizes, each as it is and mirrored"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write the results: detection a .pkl, segmentation a folder with a PNG for each picture",
    )
    parser.add_argument(
        "--format-only", action="store_true", help="write the results as a test server wants them, without scores"
    )
    parser.add_argument("--show", action="store_true", help="show each picture with its result")
    parser.add_argument("--show-dir", metavar="FOLDER", help="write each picture with its result there")
    parser.add_argument(
        "--show-score-thr", type=float, default=0.3, help="detection: draw what scores at least this (%(default)s)"
    )
    parser.add_argument(
        "--eval-options", nargs="+", default=[], metavar="KEY=VALUE", help="options of the metric, as classwise=True"
    )
    parser.add_argument("--gpu-collect", action="store_true", help="gather the processes' results over GPUs")
    parser.add_argument("--tmpdir", metavar="FOLDER", help="gather the processes' results through this folder")
    return parser


def key_values(words: list[str], option: str) -> dict:
    from mmengine.config import DictAction

    parsed = argparse.Namespace()
    for word in words:
        if not re.fullmatch(r"[^=]+=.*", word):
            raise UserError(f"not KEY=VALUE ({option}, {word}): write it as model.backbone.pad=zero")
    try:
        DictAction(option, "values")(None, parsed, words)
    except (AssertionError, ValueError, IndexError) as error:
        raise UserError(f"not a value ({option}, {' '.join(words)}): {error}") from None
    return parsed.values


def configure(args, library: str):
    """The config with what the command line says, for this machine, and the processes of the run joined."""
    from dense.checks import read_config
    from dense.runner import for_this_machine

    cfg = read_config(args.config)
    if cfg.get("default_scope") != library:
        raise UserError(
            f"a config for {cfg.get('default_scope')} ({args.config}): {libraries.TASKS[library]} reads those for "
            f"{library}"
        )
    try:
        cfg.merge_from_dict(key_values(args.options, "--options") | key_values(args.cfg_options, "--cfg-options"))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"cannot set that in the config (--cfg-options): {str(error).strip()}") from None
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
    for line in for_this_machine(cfg):
        say(line)
    if args.launcher == "pytorch" and not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
    return cfg


def say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def start(args, cfg, payload: dict):
    """The runner of a config, which will not read the file of `payload` again; what the config's parts refuse is one
    line.
    """
    from dense.checks import ClassesCheck
    from dense.pictures import reason
    from dense.runner import TwinsRunner

    try:
        with libraries.quiet():
            runner = TwinsRunner.from_cfg(cfg)
    except (TypeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(f"cannot build what the config says ({args.config}): {reason(error)}") from error
    runner.register_hook(ClassesCheck())
    runner.opened = {cfg.load_from: payload}
    if is_main_process():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record = environment(device, runner.seed) | libraries.versions(cfg.default_scope)
        files.write_text(Path(runner.log_dir) / "environment.json", json.dumps(record, indent=1) + "\n")
    return runner


def train(library: str, argv: list[str] | None = None) -> None:
    sys.exit(finish(lambda: run_training(train_parser().parse_args(argv), library)))


def test(library: str, argv: list[str] | None = None) -> None:
    sys.exit(finish(lambda: run_test(test_parser(library).parse_args(argv), library)))


def finish(run: Callable[[], None]) -> int:
    """Errors of the user are one line and exit code 2."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    try:
        with process_group():
            run()
            # the runner is a cycle: its model must let go of the group before the group ends, or the process may abort
            gc.collect()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2
    return 0


def run_training(args, library: str) -> None:
    if args.gpus or args.gpu_ids:
        raise UserError(
            "--gpus and --gpu-ids are gone (command line): bash dist_train.sh CONFIG GPUS, with CUDA_VISIBLE_DEVICES "
            "to choose them"
        )
    if args.resume_from and args.load_from:
        raise UserError(
            "both --resume-from and --load-from (command line): the first goes on with a training, the second starts "
            "a new one"
        )
    libraries.load(library)
    from dense.checks import check_batch, check_data, check_pretrained
    from training import checkpoint

    cfg = configure(args, library)
    if args.no_validate:
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    check_data(cfg, "train", *([] if args.no_validate else ["val"]))
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.randomness = dict(seed=args.seed, deterministic=args.deterministic)
    cfg.resume, cfg.load_from = (
        bool(args.resume_from or cfg.get("resume")),
        args.resume_from or args.load_from or cfg.get("load_from"),
    )
    payload = checkpoint.load(cfg.load_from) if cfg.load_from else {}
    if cfg.load_from:
        cfg.model.backbone.pretrained = None  # a whole model's weights follow
    if cfg.resume and args.seed is None:
        cfg.randomness.seed = seed_of(payload, cfg.load_from)  # the order of pictures is the seed's
    check_pretrained(cfg)
    runner = start(args, cfg, payload)
    check_batch(cfg)
    runner.train()


def seed_of(payload: dict, source: str) -> int | None:
    """Of the training that wrote a checkpoint; None where another program did."""
    meta = payload.get("meta")
    seed = meta.get("seed") if isinstance(meta, dict) else None
    if not isinstance(seed, int | None):
        raise UserError(
            f"no training to resume ({source}): its seed is no number; --load-from starts a new one from its weights"
        )
    return seed


def run_test(args, library: str) -> None:
    libraries.load(library)
    from dense.checks import check_data
    from training import checkpoint

    cfg = configure(args, library)
    for part in ("train", "val"):
        cfg[f"{part}_dataloader"] = cfg[f"{part}_cfg"] = None
    cfg.optim_wrapper = cfg.param_scheduler = cfg.val_evaluator = None
    check_data(cfg, "test")
    cfg.load_from, cfg.resume, cfg.model.backbone.pretrained = args.checkpoint, False, None
    payload = checkpoint.load(args.checkpoint)
    labels = score(args, cfg, library)
    draw(args, cfg)
    if args.aug_test:
        if "tta_model" not in cfg:
            raise UserError(f"no test-time augmentation ({args.config}): its config has no tta_model and tta_pipeline")
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(cfg.tta_model, module=cfg.model)
    runner = start(args, cfg, payload)
    with written_whole(labels) if labels is not None else contextlib.nullcontext():
        runner.test()


def unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[None]:
    """What is written to unfinished(folder) meanwhile takes its place in `folder` when all is there; after an error
    nothing does.
    """
    first = is_main_process()
    try:
        if first:
            shutil.rmtree(unfinished(folder), ignore_errors=True)  # of a run that was killed
            unfinished(folder).mkdir(parents=True)
        yield
        if first:
            folder.mkdir(exist_ok=True)
            for path in unfinished(folder).iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise UserError(f"cannot write the labels ({folder}): {error.strerror or error}") from error
    finally:
        if first:
            shutil.rmtree(unfinished(folder), ignore_errors=True)


def score(args, cfg, library: str) -> Path | None:
    """--eval, --format-only, --out, --eval-options, --gpu-collect and --tmpdir, in the words of today's metrics. Gives
    the folder of labels.
    """
    metric, labels = cfg.test_evaluator, None
    names = list(args.eval or [])
    options = key_values(args.eval_options, "--eval-options")
    if library == "mmseg":
        metric.iou_metrics = names or metric.iou_metrics
        folder = args.out or options.pop("imgfile_prefix", None)
        if folder or args.format_only:
            labels = Path(folder or os.path.join(cfg.work_dir, "labels")).with_suffix("")
            metric.output_dir, metric.keep_results, metric.format_only = str(unfinished(labels)), True, args.format_only
            say(f"a PNG of labels for each picture: {labels}")
        if options.pop("efficient_test", None) is not None:
            say("--eval-options efficient_test: not needed, results are counted picture by picture")
    else:
        if "mAP" in names:
            # The published README's word. Of boxes, and of masks where the model finds masks.
            names = [
                *(name for name in names if name != "mAP"),
                "bbox",
                *(["segm"] if "mask_head" in cfg.model.get("roi_head", {}) else []),
            ]
            say(f"--eval mAP: {' and '.join(dict.fromkeys(names))}")
        metric.metric = list(dict.fromkeys(names)) or metric.metric
        prefix = options.pop("jsonfile_prefix", None)
        if prefix or args.format_only:
            metric.outfile_prefix, metric.format_only = (
                prefix or os.path.join(cfg.work_dir, "results"),
                args.format_only,
            )
            say(f"results in COCO's format: {metric.outfile_prefix}.*.json")
        if args.out:
            if not args.out.endswith((".pkl", ".pickle")):
                raise UserError(f"not a .pkl (--out {args.out}): results in COCO's format come with --format-only")
            cfg.test_evaluator = [metric, dict(type="DumpDetResults", out_file_path=args.out)]
    metric.update(options)
    metric.collect_device = "gpu" if args.gpu_collect else "cpu"
    if args.tmpdir and library == "mmseg":
        say("--tmpdir: not needed, processes send each other a few counts")
    elif args.tmpdir:
        metric.collect_dir = args.tmpdir
    return labels


def draw(args, cfg) -> None:
    """--show, --show-dir and --show-score-thr."""
    if args.show and not os.environ.get("DISPLAY"):
        raise UserError("no display (--show): --show-dir FOLDER writes the pictures")
    if args.show or args.show_dir:
        cfg.default_hooks.visualization.update(draw=True, show=args.show, interval=1)
        if cfg.default_scope == "mmdet":
            cfg.default_hooks.visualization.update(
                score_thr=args.show_score_thr, test_out_dir=os.path.abspath(args.show_dir) if args.show_dir else None
            )
        elif args.show_dir:
            cfg.visualizer.save_dir = args.show_dir
