"""The official commands of segmentation and detection: train.py and test.py of both folders call train() and test()."""

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from training.options import Parser

# isort: split
import torch
import torch.distributed

from dense import libraries
from training import files, launcher
from training.errors import Preempted, UserError, exit_code, print_error, short_reason
from training.processes import StopSignals, explain, is_out_of_shared_memory, loading_error
from utils import environment, in_main_process, is_main_process, keep_freed_memory, leave, process_group

METRICS = {"mmseg": ["mIoU", "mDice", "mFscore"], "mmdet": ["mAP", "bbox", "segm", "proposal", "proposal_fast"]}
# Keys of a config that take one path
PATH_KEYS = {"data_root", "ann_file", "img", "img_path", "seg_map_path", "pretrained", "load_from", "work_dir"}


# ---------------------------------------------------------------- options


def add_shared_options(parser: Parser) -> None:
    parser.add_argument("config", help="a config file")
    parser.add_argument("--work-dir", metavar="FOLDER", help="output folder (work_dirs/NAME OF THE CONFIG)")
    for name in ("--options", "--cfg-options"):
        text = "set values of the config, as model.backbone.pad=zero"
        parser.add_argument(name, nargs="+", default=[], metavar="KEY=VALUE", help=text)
    kinds = ("none", "pytorch", "slurm", "mpi")
    parser.add_argument("--launcher", choices=kinds, default="none", help="what started the processes (%(default)s)")
    parser.add_argument("--local_rank", type=int, default=0, help="ignored: launchers set it in the environment")


def train_parser() -> Parser:
    parser = Parser(description="Train a model on a config.")
    add_shared_options(parser)
    text = "continue the run that wrote this checkpoint; a folder: its newest; auto: the newest of --work-dir, if any"
    parser.add_argument("--resume-from", metavar="FILE", help=text)
    text = "resume with other settings than the checkpoint's: this config's schedule and rates"
    parser.add_argument("--resume-changed", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a run that --work-dir holds")
    parser.add_argument("--load-from", metavar="FILE", help="start a new training run from the weights in this file")
    parser.add_argument("--no-validate", action="store_true", help="no scores during training")
    parser.add_argument("--seed", type=int, help="(random, and written to the log)")
    parser.add_argument("--deterministic", action="store_true", help="the same bits each time on a GPU, at some cost")
    parser.add_argument("--gpus", help="not supported: start that many processes with dist_train.sh")
    parser.add_argument("--gpu-ids", nargs="+", help="not supported: choose GPUs with CUDA_VISIBLE_DEVICES")
    return parser


def test_parser(library: str) -> Parser:
    parser = Parser(description="Evaluate a checkpoint.")
    add_shared_options(parser)
    parser.add_argument("checkpoint", help="the weights of a segmentor or a detector")
    names = METRICS[library]
    parser.add_argument("--eval", nargs="+", choices=names, metavar="NAME", help=f"{', '.join(names)} (the config's)")
    parser.add_argument("--aug-test", action="store_true", help="segmentation: average six sizes, each flipped too")
    parser.add_argument("--out", metavar="FILE", help="write detections to a .pkl file, or labels to a folder of PNGs")
    parser.add_argument("--format-only", action="store_true", help="write what a test server takes, without scores")
    parser.add_argument("--show", action="store_true", help="show each image with its result")
    parser.add_argument("--show-dir", metavar="FOLDER", help="write each image with its result to this folder")
    parser.add_argument("--show-score-thr", type=float, default=0.3, help="least score of a box shown (%(default)s)")
    pairs = dict(nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--eval-options", **pairs, help="options of the metric, as classwise=True")
    parser.add_argument("--gpu-collect", action="store_true", help="gather the processes' results over GPUs")
    parser.add_argument("--tmpdir", metavar="FOLDER", help="gather the processes' results through this folder")
    return parser


def key_values(words: list[str], option: str) -> dict:
    """Return the values of KEY=VALUE words. One with a slash and without brackets is a path, and stays as it is."""
    from mmengine.config import DictAction

    parsed, paths = argparse.Namespace(), {}
    for word in words:
        if not re.fullmatch(r"[^=]+=.*", word, re.DOTALL):
            raise UserError(f"not KEY=VALUE ({option}, {word}): write it as model.backbone.pad=zero")
        key, value = word.split("=", maxsplit=1)
        value = value.strip("'\"")
        if "/" in value and not value.startswith(("[", "(")):
            paths[key] = value
    try:
        DictAction(option, "values")(None, parsed, words)
    except (AssertionError, ValueError, IndexError) as error:
        raise UserError(f"cannot read the value ({option}, {' '.join(words)}): {error}") from None
    values = parsed.values | paths
    for key, value in values.items():
        if key.rpartition(".")[2] in PATH_KEYS and not isinstance(value, str | None):
            raise UserError(f"not a path ({option}, {key}={value}): write it with a slash, as {key}=./NAME")
    return values


# ---------------------------------------------------------------- a run


def train(library: str, argv: list[str] | None = None) -> None:
    leave(run(lambda argv: run_training(train_parser().parse_args(argv), library), argv))


def test(library: str, argv: list[str] | None = None) -> None:
    leave(run(lambda argv: run_test(test_parser(library).parse_args(argv), library), argv))


def run(main: Callable[[list[str] | None], None], argv: list[str] | None) -> int:
    """Call main as one of the processes of a run; return the exit code."""

    def in_group(argv: list[str] | None) -> None:
        with process_group():
            main(argv)
            # The runner is a cycle: its model must release the group before the group ends, or the process may abort.
            gc.collect()

    if launcher.launched():
        launcher.end_with_launcher()
    if not torch.cuda.is_available():
        keep_freed_memory()
    program = Path(sys.argv[0]).name
    try:
        return exit_code(program, in_group, argv)
    except Preempted as error:
        print_error(str(error), kind="stopped", program=program)
        return error.code
    except RuntimeError as error:
        known = is_out_of_shared_memory(error) or loading_error(error) is not None
        if not known or os.environ.get("TWINS_DEBUG") == "1":
            raise
        code, line = explain(error)
        line = line.replace("--num_workers", "num_workers of the loaders").replace(
            "--resume auto", "--resume-from auto"
        )
        print_error(line, program=program)
        return code


def print_once(line: str) -> None:
    """Print in one process, also before the processes are joined."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def configure(args, library: str):
    """Return the config with the command line's values, adapted to this machine, and join the processes of the run."""
    from dense.checks import read_config
    from dense.runner import adapt_to_machine
    from dense.transforms import set_reading

    # Register what a user's config may not import.
    if library == "mmseg":
        from dense import label_files, segmentor  # noqa: F401
    else:
        from dense import coco_files  # noqa: F401
    cfg = read_config(args.config)
    scope = cfg.get("default_scope")
    if scope != library:
        raise UserError(f"a config for {scope} ({args.config}): {libraries.TASKS[library]} needs one for {library}")
    try:
        cfg.merge_from_dict(key_values(args.options, "--options") | key_values(args.cfg_options, "--cfg-options"))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"no such key in the config (--options, --cfg-options): {str(error).strip()}") from None
    set_reading(cfg, cfg.get("reading", {}))
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("work_dirs", Path(args.config).stem)
    for line in adapt_to_machine(cfg):
        print_once(line)
    join_processes(cfg)
    return cfg


def join_processes(cfg) -> None:
    """Join the processes of the run, as mmengine's runner would, before anything is made; on a CPU as well."""
    from mmengine.dist import init_dist
    from mmengine.utils.dl_utils import set_multi_processing

    if cfg.launcher == "pytorch" and not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
    elif cfg.launcher != "none":
        set_multi_processing(**cfg.env_cfg.get("mp_cfg", {}), distributed=True)
        init_dist(cfg.launcher, **cfg.env_cfg.get("dist_cfg", {}))


def build_runner(args, cfg, payload: dict):
    """Return the runner of a config, which will not read the file of `payload` again."""
    from dense.checks import StartChecks
    from dense.runner import TwinsRunner, must_build

    try:
        with libraries.quiet(), must_build(args.config):
            runner = TwinsRunner.from_cfg(cfg)
    except ImportError as error:
        what = f"a package of the config is not installed ({args.config})"
        raise UserError(f"{what}: {short_reason(error)}; install it, or change the config") from error
    runner.register_hook(StartChecks())
    runner.opened = {cfg.load_from: payload}
    if is_main_process():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record = environment(device, runner.seed) | libraries.versions(cfg.default_scope)
        files.write_text(Path(runner.log_dir) / "environment.json", json.dumps(record, indent=1) + "\n")
    return runner


def run_training(args, library: str) -> None:
    if args.gpus or args.gpu_ids:
        raise UserError("not supported (--gpus, --gpu-ids): run dist_train.sh CONFIG GPUS, set CUDA_VISIBLE_DEVICES")
    if args.resume_from and args.load_from:
        raise UserError("both --resume-from (continue a run) and --load-from (start a new one): pass one of them")
    libraries.load(library)
    from dense.checks import check_batch, check_data, check_pretrained
    from dense.stopping import StopRun
    from dense.work_folder import OpenFolder, WorkFolder

    cfg = configure(args, library)
    if args.no_validate:
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    check_data(cfg, "train", *([] if args.no_validate else ["val"]))
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.randomness = dict(seed=args.seed, deterministic=args.deterministic)
    folder = WorkFolder(Path(cfg.work_dir), overwrite=args.overwrite)
    payload = set_start(args, cfg, folder)
    check_pretrained(cfg)
    runner = build_runner(args, cfg, payload)
    runner.resume_changed = args.resume_changed
    check_batch(cfg)
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        runner.register_hook(StopRun(signals))
        runner.register_hook(OpenFolder(folder, stack))
        runner.train()


def set_start(args, cfg, folder) -> dict:
    """Set in the config which file the run starts from, and return what it holds; {} without one.

    Raises UserError if the work folder is in use, or holds a run that would be replaced.
    """
    from training import checkpoint

    in_main_process(folder.check_free)
    cfg.resume = bool(args.resume_from or cfg.get("resume"))
    cfg.load_from = args.resume_from or args.load_from or cfg.get("load_from")
    if cfg.resume:
        own = cfg.load_from in (None, "auto")
        cfg.load_from = in_main_process(lambda: folder.checkpoint_of(cfg.load_from))
        cfg.resume = cfg.load_from is not None
        folder.resumed = cfg.resume and (own or Path(cfg.load_from).resolve().parent == folder.path.resolve())
        if not cfg.resume:
            print_once(f"resume: no checkpoint in {folder.path}, the run starts")
    if not folder.resumed:
        in_main_process(folder.check_no_run)
    if not cfg.load_from:
        return {}
    payload = checkpoint.load(cfg.load_from)
    cfg.model.backbone.pretrained = None  # the weights of the complete model follow
    if cfg.resume and args.seed is None:
        cfg.randomness.seed = seed_of(payload, cfg.load_from)  # which the order of images depends on
    return payload


def seed_of(payload: dict, source: str) -> int | None:
    """Return the seed of the run that wrote a checkpoint; None if another program did."""
    from dense.runner import cannot_resume

    meta = payload.get("meta")
    seed = meta.get("seed") if isinstance(meta, dict) else None
    if not isinstance(seed, int | None):
        raise cannot_resume(source, "its seed is not a number")
    return seed


def run_test(args, library: str) -> None:
    libraries.load(library)
    from dense.checks import check_data
    from dense.drawing import DrawResults
    from training import checkpoint

    cfg = configure(args, library)
    for part in ("train", "val"):
        cfg[f"{part}_dataloader"] = cfg[f"{part}_cfg"] = None
    cfg.optim_wrapper = cfg.param_scheduler = cfg.val_evaluator = None
    if args.format_only:
        omit_labels(cfg)
    check_data(cfg, "test")
    cfg.load_from, cfg.resume, cfg.model.backbone.pretrained = args.checkpoint, False, None
    payload = checkpoint.load(args.checkpoint)
    set_metric = set_segmentation_metric if library == "mmseg" else set_detection_metric
    label_folder = set_metric(args, cfg, key_values(args.eval_options, "--eval-options"))
    set_drawing(args, cfg)
    if args.aug_test:
        if "tta_model" not in cfg:
            raise UserError(f"no test-time augmentation ({args.config}): add a tta_model and a tta_pipeline")
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(cfg.tta_model, module=cfg.model)
    runner = build_runner(args, cfg, payload)
    if args.show_dir:
        threshold = dict(pred_score_thr=args.show_score_thr) if library == "mmdet" else {}
        runner.register_hook(DrawResults(Path(args.show_dir), **threshold))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what is half written is removed
    with all_or_nothing(label_folder) if label_folder else contextlib.nullcontext():
        runner.test()


def omit_labels(cfg) -> None:
    """Remove from the config what reads the labels or annotations of a test."""

    def without_labels(steps: list) -> list:
        steps = [without_labels(step) if isinstance(step, list) else step for step in steps]
        named = [str(step["type"]) if isinstance(step, dict) else "" for step in steps]
        steps = [step for step, name in zip(steps, named) if step != [] and not name.endswith("LoadAnnotations")]
        return [
            step | dict(transforms=without_labels(step["transforms"])) if "transforms" in step else step
            for step in steps
        ]

    dataset = cfg.test_dataloader.dataset
    dataset.pipeline = without_labels(dataset.pipeline)
    if "tta_pipeline" in cfg:
        cfg.tta_pipeline = without_labels(cfg.tta_pipeline)
    dataset.get("data_prefix", {}).pop("seg_map_path", None)


# ---------------------------------------------------------------- results of a test


def unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


@contextlib.contextmanager
def all_or_nothing(folder: Path) -> Iterator[None]:
    """Move what is written to unfinished(folder) meanwhile into `folder` at the end; after an error, delete it."""
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
        if error.filename and unfinished(folder).name not in str(error.filename):  # of something else
            raise
        raise UserError(f"cannot write the labels ({folder}): {error.strerror or error}; pass another --out") from error
    finally:
        if first:
            shutil.rmtree(unfinished(folder), ignore_errors=True)


def set_segmentation_metric(args, cfg, options: dict) -> Path | None:
    """Set the metric by the options of a test; return the folder for labels, if they are to be written."""
    metric, labels = cfg.test_evaluator, None
    metric.iou_metrics = args.eval or metric.iou_metrics
    folder = args.out or options.pop("imgfile_prefix", None)
    if folder or args.format_only:
        labels = Path(folder or os.path.join(cfg.work_dir, "labels")).with_suffix("")
        metric.output_dir, metric.format_only = str(unfinished(labels)), args.format_only
        print_once(f"a PNG of labels for each image: {labels}")
    if options.pop("efficient_test", None) is not None:
        print_once("--eval-options efficient_test: not needed, each image is counted at once")
    metric.update(options, collect_device="gpu" if args.gpu_collect else "cpu")
    if args.tmpdir:
        print_once("--tmpdir: not needed, processes exchange a few counts only")
    return labels


def set_detection_metric(args, cfg, options: dict) -> None:
    """Set the metric by the options of a test. mAP, the official README's name, is that of boxes, and of masks too if
    the model has a mask head.
    """
    metric, names = cfg.test_evaluator, list(args.eval or [])
    if "mAP" in names:
        names = [name for name in names if name != "mAP"] + ["bbox"]
        names += ["segm"] if "mask_head" in cfg.model.get("roi_head", {}) else []
        print_once(f"--eval mAP: {' and '.join(dict.fromkeys(names))}")
    metric.metric = list(dict.fromkeys(names)) or metric.metric
    prefix = options.pop("jsonfile_prefix", None)
    if prefix or args.format_only:
        metric.outfile_prefix = prefix or os.path.join(cfg.work_dir, "results")
        metric.format_only = args.format_only
        print_once(f"results in COCO's format: {metric.outfile_prefix}.*.json")
    metric.update(options, collect_device="gpu" if args.gpu_collect else "cpu")
    if args.tmpdir:
        metric.collect_dir = args.tmpdir
    if args.out:
        if not args.out.endswith((".pkl", ".pickle")):
            raise UserError(f"not a .pkl file (--out {args.out}): for results in COCO's format, pass --format-only")
        cfg.test_evaluator = [metric, dict(type="DumpDetResults", out_file_path=args.out)]


def set_drawing(args, cfg) -> None:
    """Set the visualization on the screen by --show and --show-score-thr."""
    if args.show and not os.environ.get("DISPLAY"):
        raise UserError("no display (--show): pass --show-dir FOLDER to write the images to files")
    if args.show:
        cfg.default_hooks.visualization.update(draw=True, show=True, interval=1)
        if cfg.default_scope == "mmdet":
            cfg.default_hooks.visualization.update(score_thr=args.show_score_thr)
