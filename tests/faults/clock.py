"""A clock that jumps by a day, back and forth: python tests/faults/clock.py

Every process of a run sees a system clock of its own that jumps every few readings: a library that is loaded first
stands in for it, because the real clock is everybody's. The run must end like an undisturbed one, with the same bits,
and its log and status.json must hold times that can be. Skipped without a C compiler.
"""

import datetime
import shutil
import subprocess
import sys
from pathlib import Path

from common import Started, command, complain, make_data, result, run_program, status, words

from training.run_folder import log_lines

PROCESSES, DAY_S = 2, 86400
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

static unsigned readings;

static time_t jump(void) { return ((time_t)(readings++ / 16 % 3) - 1) * 86400; }

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += jump();
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec precise;
    int code = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return code;
}

time_t time(time_t *store) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (store) *store = precise.tv_sec;
    return precise.tv_sec;
}
"""


def compiler() -> str | None:
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def body(table, args, base: Path) -> None:
    if compiler() is None:
        table.skip("a clock that jumps", "no C compiler here")
        return
    source, library = base / "clock.c", base / "clock.so"
    source.write_text(CLOCK)
    subprocess.run([compiler(), "-shared", "-fPIC", "-O1", source, "-o", library, "-ldl"], check=True)
    seen = [sys.executable, "-c", "import time; seen = [time.time() for _ in range(99)]; print(max(seen) - min(seen))"]
    jump = float(subprocess.run(seen, env={"LD_PRELOAD": str(library)}, capture_output=True, text=True).stdout)
    if jump < DAY_S:
        raise RuntimeError(f"the library does not stand in for the clock: it jumped by {jump} s")
    data = make_data(base / "data", train=10, val=4)

    def run(name: str, **env: str) -> tuple[Path, Started]:
        options = words(data, base / name, num_workers=1)
        return base / name, Started(command(options, processes=PROCESSES), base / f"out-{name}", **env)

    whole, undisturbed = run("whole")
    if undisturbed.wait() != 0:
        raise RuntimeError(f"the undisturbed run failed: {undisturbed.stderr()[-500:]}")
    with table.row("a clock that jumps by a day", f"a library loaded first, {PROCESSES} processes") as row:
        folder, jumping = run("jumping", LD_PRELOAD=str(library))
        code = jumping.wait()
        problems = [complain(code == 0, f"exit {code}: {jumping.stderr()[-500:]}")]
        if code == 0:
            seconds = [line["time"] for line in log_lines(folder / "log.txt")]
            off = datetime.datetime.fromisoformat(status(folder)["started"]) - datetime.datetime.now(datetime.UTC)
            problems += [
                complain(result(folder) == result(whole), "other bits than an undisturbed run"),
                complain(all(0 < each < 600 for each in seconds), f"epochs took {seconds} seconds"),
                complain(abs(off.total_seconds()) < 2 * DAY_S, f"started {off} from now"),
            ]
        row.check(*problems)


if __name__ == "__main__":
    run_program(__doc__, body)
