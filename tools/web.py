"""Show a trained Twins on a local page: python -m tools.web --weights FILE.

Drop an image: the page answers with the top 5 classes as bars and attention maps of each stage, and with overlays where
a segmentor or a detector was given. A click on the image chooses the position whose attention is drawn. The page needs
no network, and only this machine reaches it unless --host says otherwise. An upload is deleted once it is read; what
the browser shows is deleted after ten minutes, and when the page stops. Ctrl-C stops it.
"""

import os

# Before anything imports the hub's client or gradio: neither may look for a network.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")

import gvt

# isort: split
import argparse
import base64
import html
import io
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from PIL import Image

from tools import attention, sheets, views
from tools.attention_maps import empty_maps
from tools.extra import need
from tools.trained import Trained
from tools.views import View
from training import options
from training.command_line import add_device, add_max_pixels, numbers
from training.errors import UserError, exit_code, short_reason
from training.folders import image_files
from training.images import ImageReader

MAX_BYTES = 20 * 2**20  # of an upload
MAX_PIXELS = 50_000_000  # 150 MB once decoded: several people may use the page
TOP, EXAMPLES = 5, 10
SMALLEST, LARGEST = 320, 1024  # pixels of the longer side of an image on the page
CLEANED_EVERY, KEPT = 60, 600  # seconds
QUEUE = dict(concurrency_id="model", concurrency_limit=1, api_visibility="private")


class Answer(NamedTuple):
    """What the page shows for an image, in the order of its components; seen: for later clicks."""

    drop: None = None
    seen: tuple[View, tuple[float, float], str] | None = None  # view, scale of the shown image, title
    shown: Image.Image | None = None
    top: dict[str, float] | None = None
    overlays: str = ""
    maps: str = ""
    status: str = ""


class Explorer:
    """Answer what the page asks.

    overlays: name -> function from an image's path to a drawing and a line about it. folder: of uploads, the only one
    that is read from and deleted in.
    """

    def __init__(self, made: Trained, overlays: dict[str, Callable], folder: Path, max_pixels: int = MAX_PIXELS):
        self.made, self.overlays, self.folder, self.max_pixels = made, overlays, folder.resolve(), max_pixels
        self.reader = ImageReader(alpha=made.alpha, exif="apply", max_pixels=max_pixels)
        repeated = Counter(made.classes)
        self.names = [f"{name} ({k})" if repeated[name] > 1 else name for k, name in enumerate(made.classes)]
        self.device = next(made.model.parameters()).device

    def upload(self, path: str | None) -> Answer:
        """Answer for an upload, and delete it."""
        if path is None:
            return Answer()
        if not Path(path).resolve().is_relative_to(self.folder):
            return Answer(status="not an upload: drop an image")
        try:
            return self.answer(path)
        finally:
            Path(path).unlink(missing_ok=True)

    def answer(self, path: str) -> Answer:
        try:
            start = time.perf_counter()
            image = self.reader(path)
            seen = views.view(self.made, image, max_pixels=self.max_pixels)
            with torch.inference_mode():
                probabilities = self.made.model(seen.x)[0].float().softmax(0)
            if not probabilities.isfinite().all():
                raise UserError(f"an output that is not finite ({path}): use another checkpoint")
            values, classes = (each.tolist() for each in probabilities.topk(min(TOP, len(self.names))))
        except UserError as error:
            return Answer(status=without_folder(error, path))
        seconds = time.perf_counter() - start
        shown = sheets.scaled(image, SMALLEST, LARGEST)
        title = f"{self.names[classes[0]]}, {values[0]:.1%}"
        state = seen, (shown.width / image.width, shown.height / image.height), title
        overlays, lines = self.draw_overlays(path)
        maps, line = self.draw_maps(seen, title, None)
        about = f"{image.width} x {image.height} pixels, predicted in {1000 * seconds:.0f} ms on {self.device}"
        top = {self.names[index]: value for index, value in zip(classes, values)}
        return Answer(None, state, shown, top, overlays, maps, "\n".join([about, *lines, line]))

    def click(self, state: tuple | None, index: Sequence[int]) -> tuple[str, str]:
        """Return the maps for a click on the shown image, and a line about them."""
        if state is None:
            return "", "no image: drop one"
        seen, scale, title = state
        point = tuple((each + 0.5) / factor for each, factor in zip(index, scale))
        try:
            return self.draw_maps(seen, title, seen.to_view(point))
        except UserError as error:
            return "", str(error).removesuffix(", or --whole")

    def draw_maps(self, seen: View, title: str, query: tuple[float, float] | None) -> tuple[str, str]:
        """Return the figures of each stage and of rollout as HTML, and a line. query: in pixels of the view."""
        start = time.perf_counter()
        try:
            empty_maps(self.made.model, seen.x.shape[2:])
        except UserError as error:
            return "", str(error)
        name = "the most confident position" if query is None else "the click"
        query = query or attention.predict(self.made.model, seen.x)[2]
        drawn = ""
        for figure in attention.draw(self.made.model, seen, {name: query}, title):
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=110)
            drawn += as_html(content.getvalue(), "attention maps")
        x, y = seen.to_original(query)
        return drawn, f"attention of {name}, ({x:.0f}, {y:.0f}): drawn in {time.perf_counter() - start:.1f} s"

    def draw_overlays(self, path: str) -> tuple[str, list[str]]:
        """Return the drawings of the segmentor and the detector as HTML, and a line about each."""
        drawn, lines = "", []
        for name, draw in self.overlays.items():
            start = time.perf_counter()
            try:
                content, found = draw(path)
            except UserError as error:
                lines.append(f"{name}: {without_folder(error, path)}")
                continue
            drawn += as_html(content, name)
            lines.append(f"{name}: {found}; {time.perf_counter() - start:.1f} s")
        return drawn, lines


def without_folder(error: UserError, path: str) -> str:
    return str(error).replace(path, Path(path).name)


def as_html(content: bytes, what: str) -> str:
    """Return a PNG as an element that holds it: no file is left behind."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(what)}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def overlay(library: str, config: str, weights: str, device: str) -> Callable[[str], tuple[bytes, str]]:
    """Return a function from an image's path to a PNG of what a segmentor or detector finds, and a line about it."""
    from dense import demo, libraries

    libraries.load(library)
    from mmengine.registry import DefaultScope

    predictor = demo.Predictor(config, weights, [], library, device)
    settings = demo.demo_parser(library).parse_args(["IMAGE", config, weights, "--out-dir", "unused"])
    drawer = (demo.Segments if library == "mmseg" else demo.Objects)(predictor, settings)

    def draw(path: str) -> tuple[bytes, str]:
        with DefaultScope.overwrite_default_scope(library), tempfile.TemporaryDirectory() as folder:
            pixels, result = predictor(path)
            found = drawer.write(path, pixels, result, Path(folder) / "drawn")
            return (Path(folder) / "drawn.png").read_bytes(), found

    return draw


# ---------------------------------------------------------------- the page


def examples(folder: str | None) -> list[str]:
    """Return up to EXAMPLES images of a folder, spread over it."""
    paths = image_files([folder]) if folder else []
    return [paths[len(paths) * k // EXAMPLES] for k in range(EXAMPLES)] if len(paths) > EXAMPLES else paths


def build(gradio: ModuleType, explorer: Explorer, samples: list[str]):
    """Return the page, a gradio.Blocks."""
    made = explorer.made
    about = f"{made.name}, {len(made.classes)} classes, {' x '.join(map(str, made.sides))} pixels, {explorer.device}"
    with gradio.Blocks(analytics_enabled=False, title="Twins", delete_cache=(CLEANED_EVERY, KEPT)) as page:
        gradio.Markdown("# Twins")
        gradio.Text(about, show_label=False, container=False)
        with gradio.Row():
            with gradio.Column():
                kinds = dict(type="filepath", image_mode=None, sources=["upload", "clipboard"])
                drop = gradio.Image(label="drop an image", height=160, **kinds)
                kinds = dict(format="png", interactive=False, buttons=["fullscreen"])
                shown = gradio.Image(label="click: what does this position attend to?", elem_id="shown", **kinds)
            with gradio.Column():
                top = gradio.Label(num_top_classes=TOP, label="prediction", elem_id="top")
                status = gradio.Textbox(label="status", lines=2, interactive=False, elem_id="status")
                overlays = gradio.HTML(visible=bool(explorer.overlays))
        seen, maps = gradio.State(None, time_to_live=KEPT), gradio.HTML(elem_id="maps")
        connect(gradio, explorer, samples, [drop, seen, shown, top, overlays, maps, status])
    return page


def connect(gradio: ModuleType, explorer: Explorer, samples: list[str], outputs: list) -> None:
    """Let the page answer uploads, clicks and the examples, which it shows. outputs: components as in Answer."""
    drop, seen, shown, *_, maps, status = outputs

    def click(state, event):
        return explorer.click(state, event.index)

    def choose(event):
        return explorer.answer(samples[event.index])

    for each in (click, choose):
        each.__annotations__["event"] = gradio.SelectData  # by which gradio knows what to pass
    # Without preprocessing: Gradio's own would open the file with Pillow, and an error there would keep it.
    drop.upload(lambda file: explorer.upload(file and file.get("path")), drop, outputs, preprocess=False, **QUEUE)
    shown.select(click, seen, [maps, status], **QUEUE)
    if samples:
        settings = dict(columns=EXAMPLES, height=120, allow_preview=False, interactive=False)
        gradio.Gallery(samples, label="examples", **settings).select(choose, None, outputs, **QUEUE)


def serve(gradio: ModuleType, page, host: str, port: int) -> str:
    """Start the page and return its address; raise UserError if it cannot have the port."""
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    limits = dict(max_file_size=MAX_BYTES, state_session_capacity=100)
    alone = dict(share=False, ssr_mode=False, mcp_server=False, enable_monitoring=False, footer_links=[])
    how = dict(prevent_thread_lock=True, quiet=True, theme=theme, **limits, **alone)
    try:
        return page.launch(server_name=host, server_port=port, **how)[1]
    except OSError as error:
        raise UserError(
            f"cannot serve (--host {host} --port {port}): {short_reason(error, 120)}; try another"
        ) from error


def run(args: argparse.Namespace) -> int:
    """Serve the page until a signal stops it."""
    with tempfile.TemporaryDirectory(prefix="twins_web_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        gradio = need("gradio")
        made = views.load(args)
        device = str(next(made.model.parameters()).device)
        given = {"segmentor": ("mmseg", args.segmentor), "detector": ("mmdet", args.detector)}
        overlays = {name: overlay(library, *files, device) for name, (library, files) in given.items() if files}
        explorer = Explorer(made, overlays, Path(folder), args.max_pixels)
        page, stop = build(gradio, explorer, examples(args.examples)), threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        try:
            address = serve(gradio, page, args.host, args.port)
            if args.host not in ("127.0.0.1", "localhost", "::1"):
                print(f"anyone who reaches this machine can use the page (--host {args.host})")
            print(f"{address}  Ctrl-C stops it", flush=True)
            stop.wait()
        finally:
            page.close(verbose=False)
    return 0


def main(argv: list[str]) -> int:
    parser = options.Parser(prog="web.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    files = dict(nargs=2, type=options.path, metavar=("CONFIG", "CHECKPOINT"))
    add("--weights", required=True, type=options.path, metavar="FILE", help="a checkpoint of a classifier")
    add("--model", choices=tuple(gvt.MODEL_NAMES), metavar="NAME", help="if the checkpoint does not name it")
    add("--segmentor", **files, help="draw its classes as well")
    add("--detector", **files, help="draw its boxes and masks as well")
    add("--examples", type=options.path, metavar="FOLDER", help=f"show {EXAMPLES} of its images to choose from")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="who can reach the page (%(default)s: this machine)")
    add("--port", type=numbers(int, "a port, 1 to 65535", lambda port: 1 <= port < 65536), default=7860)
    add_device(parser)
    add_max_pixels(parser, MAX_PIXELS)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_code("web.py", main, sys.argv[1:]))
