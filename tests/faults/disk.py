"""A disk that is full, a limit on file sizes, a read-only disk, errors of the disk: python tests/faults/disk.py

A run is continued where it cannot save. It must end with one line and exit code 1 or 2; the checkpoints that were there
must keep their bytes, and no unfinished file may be left. Where the disk fills up or is unmounted in the middle of a
run, the run must also continue afterwards and end with the bits of an undisturbed one; with --keep-going it must
outlive a full disk, and it must outlive a slow one. Real file systems where mounting is allowed (root), and strace's
injection where it is there.
"""

import contextlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common import (
    HERE,
    ROOT,
    Row,
    Started,
    command,
    complain,
    contents,
    environment,
    error_lines,
    make_data,
    result,
    run_program,
    words,
)
from conftest import have_strace

MISSED = 3  # saves while the disk is full
SLOW = "inject=fsync:delay_enter=300000"  # microseconds


def can_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    )


# Inside a mount namespace of its own: {mount} changes the folder, then the run; what is left is listed before the mount
# goes away.
INSIDE = """
set -e
{mount}
before=$(cd {folder} && sha256sum *.pth)
code=0
{run} || code=$?
after=$(cd {folder} && sha256sum *.pth)
[ "$before" = "$after" ] && echo "BYTES same" || echo "BYTES differ: $after"
echo "LEFT $(ls -A {folder} | grep -c tmp || true)"
echo "CODE $code"
"""


class Case:
    def __init__(self, base: Path):
        self.base, self.data = base, make_data(base / "data", train=4, val=2)
        self.prepared = base / "prepared"
        if not self.prepared.exists():
            done = self.run(self.prepared, epochs=1)
            if done.returncode != 0:
                raise RuntimeError(f"the first part of the run failed: {done.stderr[-300:]}")

    def line(self, folder: Path, epochs: int = 3) -> list[str]:
        return [*command(words(self.data, folder, epochs=epochs)), "--resume-changed"]

    def run(
        self, folder: Path, *, epochs: int = 3, before: Callable | None = None, prefix: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess:
        line = [*prefix, *self.line(folder, epochs)]
        return subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=ROOT, preexec_fn=before)

    def fresh(self) -> Path:
        folder = self.base / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.prepared, folder)
        return folder


def judge(row: Row, what: str, code: int, said: str, problem: str) -> None:
    lines = error_lines(said)
    row.check(
        problem and f"{what}: {problem}",
        complain(code in (1, 2), f"{what}: exit {code}: {said[-300:]}"),
        complain(len(lines) == 1 and len(said.strip().splitlines()) == 1, f"{what}: it said {said[-300:]!r}"),
    )


def plain(row: Row, case: Case, what: str, **how: object) -> None:
    folder = case.fresh()
    before = contents(folder)
    done = case.run(folder, **how)
    after = contents(folder)
    kept = {name: value for name, value in before.items() if name.endswith(".pth")}
    problem = complain({name: after.get(name) for name in kept} == kept, "a checkpoint has other bytes")
    problem += complain(not any(name.endswith(".tmp") for name in after), "an unfinished file is left")
    judge(row, what, done.returncode, done.stderr, problem)


def mounted(row: Row, case: Case, what: str, mount: str) -> None:
    folder = case.fresh()
    run = " ".join(f"'{word}'" for word in case.line(folder))
    script = INSIDE.format(mount=mount.format(folder=folder, copy=case.prepared), folder=folder, run=run)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, env=environment(), cwd=ROOT
    )
    found = dict(line.partition(" ")[::2] for line in done.stdout.splitlines()[-3:])
    if "CODE" not in found:
        return row.lost(f"{what}: {done.stderr[-300:]}")
    problem = complain(found["BYTES"] == "same", "a checkpoint has other bytes") + complain(
        found["LEFT"] == "0", "an unfinished file is left"
    )
    judge(row, what, int(found["CODE"]), done.stderr, problem)


class Mount:
    """A file system in memory at a folder, seen only inside a mount namespace, which a process holds."""

    def __init__(self, folder: Path):
        folder.mkdir()
        script = f"mount -t tmpfs -o size=400m tmpfs {folder} && echo mounted && exec sleep 3600"
        self.holder = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
        if self.holder.stdout.readline() != "mounted\n":
            raise RuntimeError(f"cannot mount ({folder})")
        self.folder, self.inside = folder, Path(f"/proc/{self.holder.pid}/root{folder}")

    def line(self, words: list[str]) -> list[str]:
        """Return the words that start a program inside."""
        return ["nsenter", f"--target={self.holder.pid}", "--mount", *words]

    def do(self, *words: str) -> None:
        subprocess.run(self.line([str(word) for word in words]), capture_output=True)

    def end(self) -> None:
        self.holder.kill()
        self.holder.wait()


class Middle:
    """Accidents in the middle of a run whose folder is a mount of its own."""

    def __init__(self, base: Path):
        self.base, self.data = base, make_data(base / "more", train=20, val=2)
        whole = Started(self.line(base / "whole"), base / "out")
        if whole.wait() != 0:
            raise RuntimeError(f"the undisturbed run failed: {whole.stderr()[-300:]}")
        self.expected = result(base / "whole")

    def line(self, folder: Path, *more: str) -> list[str]:
        return [*command(words(self.data, folder, epochs=2)), *more]

    @contextlib.contextmanager
    def started(self, *more: str) -> Iterator[tuple[Mount, Started]]:
        """A run that has saved its first checkpoint."""
        shutil.rmtree(self.base / "mount", ignore_errors=True)
        mount = Mount(self.base / "mount")
        run = Started(mount.line(self.line(mount.folder, *more)), self.base / "out")
        try:
            if not run.wait_for((mount.inside / "checkpoint.pth").exists):
                raise RuntimeError(f"it ended too early: {run.stderr()[-300:]}")
            yield mount, run
        finally:
            run.kill()
            mount.end()

    def continued(self, mount: Mount) -> str:
        """Continue the run to its end; return the problem."""
        again = Started(mount.line(self.line(mount.folder)), self.base / "out")
        return complain(again.wait() == 0, f"it did not continue: {again.stderr()[-300:]}") or self.same(mount)

    def same(self, mount: Mount) -> str:
        return complain(result(mount.inside) == self.expected, "other bits than an undisturbed run")

    def full(self, row: Row) -> None:
        with self.started() as (mount, run):
            mount.do("dd", "if=/dev/zero", f"of={mount.folder}/filler", "bs=64k")
            code = run.wait()
            left = [path.name for path in mount.inside.glob(".*.tmp")]
            mount.do("rm", f"{mount.folder}/filler")
            lines = error_lines(run.stderr())
            row.check(
                complain(code in (1, 2) and len(lines) == 1, f"exit {code}: {run.stderr()[-300:]!r}"),
                complain(not left, f"an unfinished file is left: {left}"),
                self.continued(mount),
            )
        with self.started("--keep-going") as (mount, run):
            mount.do("dd", "if=/dev/zero", f"of={mount.folder}/filler", "bs=64k")
            run.wait_for(lambda: run.stderr().count("going on (--keep-going)") >= MISSED)
            mount.do("rm", f"{mount.folder}/filler")
            code = run.wait()
            row.check(complain(code == 0, f"exit {code}: {run.stderr()[-300:]!r}") or self.same(mount))

    def vanished(self, row: Row) -> None:
        """Unmount the folder while the run goes on, and mount it again from another place."""
        with self.started() as (mount, run):
            kept = self.base / "kept"
            kept.mkdir(exist_ok=True)
            mount.do("mount", "--bind", mount.folder, kept)
            mount.do("umount", "--lazy", mount.folder)
            code, lines = run.wait(), error_lines(run.stderr())
            strays = [path.name for path in mount.folder.iterdir()]
            mount.do("mount", "--bind", kept, mount.folder)
            row.check(
                complain(code == 2 and len(lines) == 1, f"exit {code}: {run.stderr()[-300:]!r}"),
                complain("if its disk was unmounted" in run.stderr(), f"it said {lines}"),
                complain(not strays, f"files below the mount: {strays}"),
                self.continued(mount),
            )

    def slow(self, row: Row) -> None:
        folder = self.base / "slow"
        line = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", SLOW, *self.line(folder)]
        run = Started(line, self.base / "out")
        code = run.wait()
        row.check(
            complain(code == 0, f"exit {code}: {run.stderr()[-300:]!r}"),
            complain(code != 0 or result(folder) == self.expected, "other bits than an undisturbed run"),
        )


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def body(table, args, base: Path) -> None:
    case = Case(base)
    size = sum(path.stat().st_size for path in case.prepared.iterdir()) // 2**20
    with table.row("a limit on file sizes", "RLIMIT_FSIZE of 1 MB") as row:
        plain(row, case, "EFBIG", before=limit_file_size)
    if can_mount():
        with table.row("a full disk", "tmpfs in a mount namespace") as row:
            # Room for half of another checkpoint, and none at all.
            for room in (10,) if args.short else (10, 0):
                full = f"mount -t tmpfs -o size={size + 1 + room}m tmpfs {{folder}} && cp -a {{copy}}/. {{folder}}/"
                if room == 0:
                    full += " && dd if=/dev/zero of={folder}/filler bs=64k status=none 2>/dev/null || true"
                mounted(row, case, f"tmpfs with {room} MB left", full)
        with table.row("a read-only disk", "bind mount in a mount namespace") as row:
            mounted(row, case, "read-only", "mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")
        middle = Middle(base)
        with table.row("a full disk in the middle of a run", "tmpfs in a mount namespace") as row:
            middle.full(row)
        with table.row("a disk that vanishes", "umount --lazy in a mount namespace") as row:
            middle.vanished(row)
        if have_strace():
            with table.row("a slow disk", "strace's delay, 0.3 s for each fsync") as row:
                middle.slow(row)
    else:
        table.skip("a full, read-only, vanishing or slow disk", "mounts are not allowed here")
    if have_strace():
        with table.row("errors of the disk while saving", "strace's injection") as row:
            cases = {
                "no space, at a sync": "fsync:error=ENOSPC:when=4+",
                "input or output error, at a sync": "fsync:error=EIO:when=4+",
            }
            cases |= {"quota, at a rename": "rename:error=EDQUOT:when=4+"}
            cases |= {"a stale handle of a network disk, at a sync": "fsync:error=ESTALE:when=4+"}
            for what, inject in list(cases.items())[: 1 if args.short else None]:
                plain(row, case, what, prefix=("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={inject}"))
    if not (can_mount() and have_strace()):
        with table.row("errors of the disk while saving", "from inside the process") as row:
            from one_save import prepare

            for code in ("ENOSPC", "EFBIG", "EROFS", "EIO"):
                for at in (1, 9, 50)[: 1 if args.short else None]:
                    folder = base / "one"
                    shutil.rmtree(folder, ignore_errors=True)
                    prepare(folder)
                    before = contents(folder)
                    line = [sys.executable, str(HERE / "one_save.py"), str(folder), "error", code, "at", str(at)]
                    done = subprocess.run(line, capture_output=True, text=True, env=environment())
                    after = contents(folder)
                    problem = complain(
                        {name: after.get(name) for name in before} == before, "a checkpoint has other bytes"
                    )
                    problem += complain(not any(name.endswith(".tmp") for name in after), "an unfinished file is left")
                    judge(row, f"{code} from call {at} on", done.returncode, done.stderr, problem)


if __name__ == "__main__":
    run_program(__doc__, body)
