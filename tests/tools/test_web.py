"""tools/web.py: what the page answers is what the model predicts, and nothing leaves the machine or stays on it."""

import asyncio
import base64
import gc
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from tools import attention, trained, web
from training.errors import UserError, exit_code

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
# Of Gradio, pandas and asyncio, in threads of the page; ours are errors in the tests without a page.
WARNS = pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning", "default::ResourceWarning")


@pytest.fixture(autouse=True)
def no_loop_left():
    """Free the event loops that Gradio leaves open, which would warn in whichever test collects the garbage."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.set_event_loop(None)
        gc.collect()


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    return folder


@pytest.fixture
def explorer(classifier, uploads):
    return web.Explorer(trained.load(str(classifier)), {}, uploads)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def upload(folder, image, name="dog.png", **how):
    image.save(folder / name, **how)
    return str(folder / name)


def drawings(text):
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", text)]


# ---------------------------------------------------------------- what it answers


def test_an_upload_is_predicted_as_by_the_model_and_deleted(explorer, uploads):
    image = noise(48, 36)
    answer = explorer.upload(upload(uploads, image))
    with torch.inference_mode():
        expected = explorer.made.model(explorer.made.transform(image)[None])[0].softmax(0)
    names = explorer.made.classes
    assert answer.top == pytest.approx({names[k]: float(expected[k]) for k in range(4)}, abs=1e-6)
    assert list(answer.top)[0] == names[int(expected.argmax())]
    assert answer.status.startswith("48 x 36 pixels, predicted in ") and " ms on cpu" in answer.status
    assert len(drawings(answer.maps)) == 5  # stages and rollout
    assert answer.shown.size == (320, 240) and answer.drop is None
    assert not list(uploads.iterdir())


def test_a_click_is_a_query_in_pixels_of_the_original(explorer, uploads, monkeypatch):
    asked, draw = [], attention.draw
    monkeypatch.setattr(attention, "draw", lambda *args: asked.append(args[2]) or draw(*args))
    answer = explorer.upload(upload(uploads, noise(48, 36)))
    seen = answer.seen[0]
    assert asked == [{"the most confident position": attention.predict(explorer.made.model, seen.x)[2]}]
    maps, line = explorer.click(answer.seen, [160, 120])  # the middle of the image as it is shown
    x, y = asked[1]["the click"]
    assert (x, y) == pytest.approx(seen.to_view((160.5 * 48 / 320, 120.5 * 36 / 240)))
    assert "(24, 18)" in line and len(drawings(maps)) == 5 and maps != answer.maps
    maps, line = explorer.click(answer.seen, [0, 0])  # cut off by the evaluation's crop
    assert maps == "" and line.startswith("outside of what the model sees (0.075,0.075)") and "--whole" not in line
    assert explorer.click(None, [0, 0]) == ("", "no image: drop one")


def test_images_are_upright_by_exif(explorer, uploads):
    exif = Image.Exif()
    exif[274] = 6
    turned, upright = noise(40, 30), noise(40, 30).transpose(Image.Transpose.ROTATE_270)
    answer = explorer.upload(upload(uploads, turned, exif=exif))
    expected = explorer.upload(upload(uploads, upright))
    assert answer.top == pytest.approx(expected.top, abs=1e-6)
    assert np.array_equal(np.asarray(answer.shown), np.asarray(expected.shown))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16"])
def test_kinds_of_images(explorer, uploads, mode):
    image = Image.fromarray(np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)) if mode == "I;16" else noise(40, 40)
    image = image if mode == "I;16" else image.convert(mode)
    answer = explorer.upload(upload(uploads, image, "x.tif"))
    assert len(answer.top) == 4 and answer.shown.mode == "RGB"


def test_what_cannot_be_read_leaves_no_old_answer_and_no_file(explorer, uploads):
    (uploads / "x.png").write_text("<html>")
    answer = explorer.upload(str(uploads / "x.png"))
    assert answer == web.Answer(status="cannot read an image (x.png): an HTML page, download the image again")
    explorer.reader.max_pixels = 1000
    answer = explorer.upload(upload(uploads, noise(40, 40)))
    assert answer.top is None and answer.status.startswith("too large an image (dog.png): 1600 pixels")
    assert not list(uploads.iterdir())
    assert explorer.upload(None) == web.Answer()


def test_only_uploads_are_read_and_deleted(explorer, tmp_path):
    path = upload(tmp_path, noise(40, 40))
    assert explorer.upload(path) == web.Answer(status="not an upload: drop an image")
    assert Path(path).exists()


def test_classes_of_one_name_keep_their_own_bars(explorer, uploads):
    explorer.made.classes[:] = ["crane", "crane", "cat", "dog"]
    answer = web.Explorer(explorer.made, {}, uploads).upload(upload(uploads, noise(40, 40)))
    assert set(answer.top) == {"crane (0)", "crane (1)", "cat", "dog"}


def test_overlays_and_their_errors_are_shown_beside_the_prediction(explorer, uploads):
    def fails(path):
        raise UserError(f"too narrow ({path}): crop it")

    explorer.overlays = {"segmentor": lambda path: (b"drawn", "sky 90%"), "detector": fails}
    answer = explorer.upload(upload(uploads, noise(40, 40)))
    assert base64.b64encode(b"drawn").decode() in answer.overlays and len(answer.top) == 4
    assert re.search(r"^segmentor: sky 90%; [\d.]+ s$", answer.status, re.M)
    assert "\ndetector: too narrow (dog.png): crop it\n" in answer.status


def test_examples_are_spread_over_a_folder(tmp_path):
    for number in range(23):
        noise(4, 4).save(tmp_path / f"{number:02}.png")
    assert [Path(path).stem for path in web.examples(str(tmp_path))] == [f"{23 * k // 10:02}" for k in range(10)]
    assert web.examples(None) == []


# ---------------------------------------------------------------- the command


def call(capsys, *words):
    return exit_code("web.py", web.main, [*map(str, words)]), capsys.readouterr().err.splitlines()


def test_bad_input_is_one_line(classifier, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs its library: make extra")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    for words, expected in {
        ("--weights", tmp_path / "none.pth"): "none.pth",
        ("--weights", classifier, "--examples", tmp_path / "none"): "none",
    }.items():
        code, lines = call(capsys, *words)
        assert code == 2 and len(lines) == 1 and lines[0].startswith("web.py: error: ") and expected in lines[0]
    with pytest.raises(SystemExit, match="2"):
        web.main(["--weights", str(classifier), "--port", "70000"])


def test_a_missing_gradio_is_one_line(classifier, capsys, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, lines = call(capsys, "--weights", classifier)
    assert code == 2 and len(lines) == 1 and "run make extra, or pip install gradio==" in lines[0]


def test_make_web_is_there():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^web: extra$", makefile, re.M) and '"make web ' in makefile


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_page_leaves_no_file_and_a_taken_port_is_one_line(classifier, tmp_path, number):
    pytest.importorskip("gradio", reason="the page needs its library: make extra")
    port, env = free_port(), os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.web", "--weights", str(classifier), "--port", str(port), "--device", "cpu"]
    page = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    try:
        assert page.stdout.readline() == f"http://127.0.0.1:{port}/  Ctrl-C stops it\n"
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("twins_web_")]
        second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
        assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
        assert f"cannot serve (--host 127.0.0.1 --port {port})" in second.stderr
        page.send_signal(number)
        assert page.wait(60) == 0 and page.stderr.read() == ""
    finally:
        page.kill()
        page.communicate()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("twins_web_")]


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def asked_outside(monkeypatch):
    """Names and addresses outside of this machine that this process asks for."""
    asked, connect, look_up = [], socket.socket.connect, socket.getaddrinfo
    here = ("127.0.0.1", "::1", "localhost", None, "", b"127.0.0.1", b"localhost")

    def watched_connect(self, address):
        if isinstance(address, tuple) and address[0] not in here:
            asked.append(address)
        return connect(self, address)

    def watched_look_up(host, *args, **kwargs):
        if host not in here:
            asked.append(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", watched_connect)
    monkeypatch.setattr(socket, "getaddrinfo", watched_look_up)
    return asked


@pytest.fixture
def short_lived(monkeypatch):
    monkeypatch.setattr(web, "CLEANED_EVERY", 1)
    monkeypatch.setattr(web, "KEPT", 1)


@pytest.fixture
def address(classifier, uploads, tmp_path, monkeypatch):
    """A page in this process, with examples."""
    gradio = pytest.importorskip("gradio", reason="the page needs its library: make extra")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(uploads))
    (tmp_path / "examples").mkdir()
    noise(30, 30, 5).save(tmp_path / "examples" / "cat.png")
    made = trained.load(str(classifier))
    page = web.build(gradio, web.Explorer(made, {}, uploads), web.examples(str(tmp_path / "examples")))
    yield web.serve(gradio, page, "127.0.0.1", free_port())
    page.close(verbose=False)


@WARNS
@pytest.mark.slow
@pytest.mark.parametrize("size, code", [(1000, 200), (web.MAX_BYTES + 1, 413)])
def test_uploads_are_limited_in_bytes_and_abandoned_ones_are_deleted(short_lived, address, uploads, size, code):
    httpx = pytest.importorskip("httpx", reason="the page needs its library: make extra")
    with httpx.Client(base_url=address, trust_env=False) as client:
        answer = client.post("gradio_api/upload", files=dict(files=("x.png", b"x" * size)))
    assert answer.status_code == code
    if code == 200:
        assert Path(answer.json()[0]).is_relative_to(uploads)
    deadline = time.monotonic() + 20
    while (left := list(uploads.rglob("x.png"))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


@WARNS
@pytest.mark.slow
def test_a_browser_uploads_reads_and_clicks_and_nothing_leaves_the_machine(
    asked_outside, address, explorer, uploads, tmp_path
):
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser needs its library: make extra")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no Chromium ({CHROMIUM}): apt-get install chromium")
    image = noise(48, 36)
    (tmp_path / "mine").mkdir()
    path = upload(tmp_path / "mine", image, "mine.png")
    expected = explorer.answer(path)
    requests = []
    with playwright.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=dict(width=1200, height=1500))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(path)
        page.wait_for_function("document.querySelectorAll('#maps img').length == 5", timeout=60_000)
        name, share = next(iter(expected.top.items()))
        assert name in page.locator("#top").inner_text() and f"{share:.0%}" in page.locator("#top").inner_text()
        status = page.locator("#status textarea")
        assert "the most confident position" in status.input_value()
        assert not [each for each in uploads.rglob("mine.png")]  # deleted after use
        page.locator("#shown img").click()
        page.wait_for_function("document.querySelector('#status textarea').value.includes('the click')", timeout=60_000)
        assert "(24, 18)" in status.input_value()
        # Not an image, whatever its name: the old prediction goes, and so does the file.
        (tmp_path / "mine" / "page.png").write_text("<html>")
        page.locator("input[type=file]").first.set_input_files(str(tmp_path / "mine" / "page.png"))
        page.wait_for_function("document.querySelector('#status textarea').value.includes('HTML')", timeout=60_000)
        page.wait_for_function("document.querySelectorAll('#maps img, #shown img').length == 0", timeout=60_000)
        assert name not in page.locator("#top").inner_text() and not [each for each in uploads.rglob("page.png")]
        browser.close()
    outside = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert requests and not outside and not asked_outside
