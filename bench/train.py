"""Training steps against PyTorch's: python -m bench.train resnext50_32x4d --batch 16 --threads 2

A step is forward, cross entropy, backward and SGD with momentum. Stacks: ours in train() as it comes, ours
with the reference backend, eager PyTorch in channels_last and NCHW (torchvision's or timm's module where one
has our names), with --compile also torch.compile. Each with malloc as it comes, and with one that keeps what
is freed ("tuned": a fresh map of 50 MB costs some milliseconds of page faults).

With --dtype bfloat16 all of them run under autocast. With --device cuda steps run there, and memory is the
GPU's.

Each runs in a process of its own (train_worker.py), is compared with float64 first, and gets a turn in each
round while the others sleep. JSON and Markdown go to --out and are rewritten after each model;
`--resume FILE` goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from . import machine
from .child import ChildFailed, ended, run_child
from .files import write_results
from .models import CannotResume
from .show import Tell, progress
from .subject import FLAGSHIPS
from .timing import NoiseGuard, Round, Session, rotated
from .train_report import markdown, model_lines, summarise, summary_lines
from .train_worker import DTYPES, STACKS

DEFAULT_MODELS = ("resnext50_32x4d", "mobilenetv1_100", "densenet121", "legacy_seresnet50")
MALLOCS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"},
}
# What has not been proven on a GPU yet is measured all the same.
SWITCHES: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"FB_GPU_PLANS": "1"}}
TURN, MOST_STEPS = 1.0, 50  # seconds of timed steps in a turn, and how many at most
PATIENCE = 1800.0  # seconds for one answer of a process; torch.compile takes minutes, float64 too

# A stack whose first step differs more from float64 gets no time. One ReLU that falls on the other side of
# zero in float32 changes all gradients in front of it: PyTorch's own are off by up to 2 % with 2 images, and
# a wrong one by more. Loss and running statistics have no such jumps: PyTorch's are off by 1e-8 to 3e-6.
LIMITS = {"loss": 1e-4, "buffers": 1e-3, "gradients": 0.1}
OWN = 4  # or so many times PyTorch's own error, where that is larger

STORED = ("models", "batch", "image", "threads", "rounds", "stacks", "malloc", "device", "dtype")


class Worker:
    """A live process of `bench.train_worker`: answers come as JSON lines, turns are asked for by stdin."""

    def __init__(self, name: str, stack: str, malloc: str, folder: Path, options: argparse.Namespace):
        root = machine.checkout_root()
        package = __package__ if root is None else "bench"
        self.command = ["-m", f"{package}.train_worker", name, "--stack", stack, *sizes(folder, options)]
        self.process = subprocess.Popen(
            [sys.executable, *self.command],
            cwd=root,
            env={**clean_environment(), **MALLOCS[malloc], **SWITCHES[options.device]},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self.said: deque[str] = deque(maxlen=8)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        for line in self.process.stderr:
            if line.strip():
                self.said.append(line.rstrip("\n"))

    def answer(self) -> dict:
        """The next answer. ChildFailed when the process ends or takes too long instead."""
        watch = threading.Timer(PATIENCE, self.process.kill)
        watch.daemon = True
        watch.start()
        line = self.process.stdout.readline()
        late = not watch.is_alive()
        watch.cancel()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.listener.join(timeout=5)
        how = f"took more than {PATIENCE:.0f} s" if late else ended(code)
        raise ChildFailed(self.command, how, None if late else code, list(self.said))

    def turn(self, steps: int) -> dict:
        with contextlib.suppress(BrokenPipeError):  # the process is gone: answer() says how
            print(steps, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """Let it end by itself, so that what torch.compile started ends too; a stuck one is killed."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.listener.join(timeout=5)
        self.process.stdout.close()
        self.process.stderr.close()


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of malloc."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}


def sizes(folder: Path, options: argparse.Namespace) -> list[str]:
    image = [] if options.image is None else ["--image", str(options.image)]
    numbers = ["--batch", str(options.batch), *image, "--threads", str(options.threads)]
    numbers += ["--device", options.device, "--dtype", options.dtype]
    return ["--folder", str(folder), *numbers]


def wrong(found: dict[str, float], own: dict[str, float]) -> str | None:
    """A sentence when a step is too far from float64, else None."""
    if "sentence" in found:
        return str(found["sentence"])
    for key, limit in LIMITS.items():
        if not found[key] <= max(limit, OWN * own[key]):
            return f"{key}: error {found[key]:.1e} against float64, PyTorch's own {own[key]:.1e}"
    return None


def measure_model(
    name: str, options: argparse.Namespace, tell: Tell, start: Callable[..., Worker] = Worker
) -> dict:
    """The row of one model: check every stack, then time those that are right in turns."""
    keys = [(stack, malloc) for malloc in options.malloc for stack in options.stacks]
    row = {"model": name, "batch": options.batch, "stacks": [], "timing": None}
    workers: dict[str, Worker] = {}
    entries: dict[str, dict] = {}
    with contextlib.ExitStack() as stack_of, tempfile.TemporaryDirectory() as folder:
        tell(0.0, "float64")
        arguments = ["-m", "{bench}.train_worker", name, "--stack", "exact", *sizes(Path(folder), options)]
        row |= run_child(arguments, timeout=PATIENCE)
        trips = [machine.core_round_trip_ns()]
        counts: dict[str, int] = {}
        for stack, malloc in keys:
            key = stack if malloc == "default" else f"{stack}, {malloc} malloc"
            entry = {"key": key, "stack": stack, "malloc": malloc, "name": STACKS[stack].name}
            row["stacks"].append(entry)
            tell(0.0, f"preparing {key}")
            worker = start(name, stack, malloc, Path(folder), options)
            stack_of.callback(worker.close)
            try:
                entry |= worker.answer()
                problem = wrong(entry["error"], row["own"])
                if problem is None:
                    first = worker.turn(1)
            except ChildFailed as failure:
                entry |= {"status": "failed", "sentence": str(failure)}
                continue
            finally:
                entry["error"] = {k: None if v == math.inf else v for k, v in entry.get("error", {}).items()}
            if problem is not None:
                entry |= {"status": "wrong", "sentence": problem}
                worker.close()
                continue
            counts[key] = max(1, min(MOST_STEPS, round(TURN / min(first["seconds"]))))
            workers[key], entries[key] = worker, entry | {"status": "timed", "turns": []}
            row["stacks"][-1] = entries[key]
        session = rounds_of(workers, entries, counts, options.rounds, tell)
    row["core_round_trip_ns"] = [*trips, machine.core_round_trip_ns()]
    return row if session is None else finish(row, entries, session)


def rounds_of(
    workers: dict[str, Worker], entries: dict[str, dict], counts: dict[str, int], rounds: int, tell: Tell
) -> Session | None:
    """Turns of all workers, in rotating order, between readings of the noise guard; None without workers.

    A worker that fails leaves the session, with its times of earlier rounds.
    """
    guard, done = NoiseGuard(), []
    for i in range(rounds):
        this = Round(order=rotated(list(workers), i) if workers else [], seconds={})
        for key in list(this.order):
            tell(i / rounds, f"timing {key}")
            this.probes.append(guard.probe())
            try:
                turn = workers[key].turn(counts[key])
            except ChildFailed as failure:
                entries[key] |= {"status": "failed", "sentence": str(failure)}
                entries[key].pop("turns")
                del workers[key]
                for earlier in (*done, this):
                    earlier.seconds.pop(key, None)
                    earlier.order.remove(key)
                continue
            this.seconds[key] = turn.pop("seconds")
            entries[key]["turns"].append(turn)
        this.probes.append(guard.probe())
        done.append(this)
    if not workers:
        return None
    quiet = min(rounds, 3)
    return Session(list(workers), done, guard.disturbed(done), {k: counts[k] for k in workers}, quiet)


def finish(row: dict, entries: dict[str, dict], session: Session) -> dict:
    """The row with times, memory and the ratios that matter (see `train_report`)."""
    for key in session.names:
        turns = entries[key].pop("turns")
        low, high = session.quartiles(key)
        steps = [t["step_mib"] for t in turns]
        entries[key] |= {
            "median_ms": round(session.median(key) * 1e3, 4),
            "quartiles_ms": [round(low * 1e3, 4), round(high * 1e3, 4)],
            "peak_mib": round(max(t["peak_mib"] for t in turns), 1),
            "step_mib": None if None in steps else round(max(steps), 1),
            "faults": round(max(t["faults"] for t in turns)),
            "loss": turns[-1]["loss"],
        }
        if "ours" in session.names:
            entries[key]["ours_is_faster_by"] = round(session.ratio(key, "ours"), 4)
        tuned = "ours, tuned malloc"
        if tuned in session.names:
            entries[key]["tuned_ours_is_faster_by"] = round(session.ratio(key, tuned), 4)
    return row | {"timing": session.as_dict()}


# ---- the command ----


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.split("\n\n")[0])
    p.add_argument("models", nargs="*", help=f"registered models (default: {' '.join(DEFAULT_MODELS)})")
    p.add_argument("--all", action="store_true", help="the best-known member of every family")
    p.add_argument("--batch", type=int, default=16, help="images of a step (default 16)")
    p.add_argument("--image", type=int, default=None, help="pixels a side (default: those of the model)")
    p.add_argument("--threads", type=int, default=None, help="default: the CPUs, at most 2")
    p.add_argument("--rounds", type=int, default=5, help="turns of each stack (default 5)")
    p.add_argument("--stacks", nargs="+", choices=tuple(STACKS), help="default: all but compile")
    p.add_argument("--compile", action="store_true", help="also torch.compile, which compiles for minutes")
    p.add_argument("--malloc", nargs="+", choices=tuple(MALLOCS), default=list(MALLOCS), help="default: both")
    p.add_argument("--device", choices=tuple(SWITCHES), default="cpu", help="where steps run (default cpu)")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="bfloat16: under autocast")
    p.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default bench/results)")
    p.add_argument("--resume", type=Path, metavar="FILE", help="measure what the JSON file of a run lacks")
    return p


def check_options(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, as a sentence."""
    import fast_backbones as fb

    if options.resume is not None:
        usual = vars(parser().parse_args([]))
        given = [key for key, value in vars(options).items() if key != "resume" and value != usual[key]]
        named = ", ".join("models" if key == "models" else f"--{key}" for key in given)
        return f"--resume takes everything from the file: leave {named} out" if given else None
    if options.models and options.all:
        return "give either names of models or --all"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no CUDA device"
    for key in ("batch", "image", "threads", "rounds"):
        value = getattr(options, key)
        if value is not None and value < 1:
            return f"--{key} {value}: at least 1"
    try:
        options.models = [fb.model_info(name).name for name in options.models]
    except ValueError as problem:
        return str(problem)
    return None


def settle_options(options: argparse.Namespace) -> None:
    """Fill in defaults and selections."""
    options.models = options.models or list(FLAGSHIPS if options.all else DEFAULT_MODELS)
    options.threads = options.threads or min(2, machine.cpu_count())
    chosen = options.stacks or [key for key in STACKS if key != "compile"]
    chosen = {*chosen, *(["compile"] if options.compile else [])}
    options.stacks = [key for key in STACKS if key in chosen]
    options.malloc = [key for key in MALLOCS if key in options.malloc]
    if options.device != "cpu":  # whose memory is PyTorch's own
        options.malloc = ["default"]


def load(path: Path) -> dict:
    """The results of an interrupted run; CannotResume where it was another machine, code or PyTorch."""
    try:
        results = json.loads(path.read_text())
        stored, facts = {key: results["options"][key] for key in STORED}, results["machine"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as problem:
        raise CannotResume(f"--resume {path}: not a result file of this program ({problem!r})") from problem
    now = json.loads(json.dumps(machine.describe(stored["threads"])))
    for key in machine.SAME:
        if facts.get(key) != now[key]:
            raise CannotResume(f"--resume {path}: {key} was {facts.get(key)}, here it is {now[key]}")
    return results


def run(options: argparse.Namespace, command: str, console: Console, out: Console) -> dict:
    """Every row that is asked for and not there yet; files are written after each."""
    if options.resume is not None:
        results = load(options.resume)
        vars(options).update(results["options"])
        folder, stem = options.resume.parent, options.resume.stem
        results |= {"failures": []}
    else:
        settle_options(options)
        facts = machine.describe(options.threads)
        folder, date = options.out, datetime.datetime.now()
        narrow = "" if options.dtype == "float32" else f"-{options.dtype}"
        stem = f"train{narrow}-{machine.short_cpu(facts)}-{options.threads}t-{date:%Y%m%d-%H%M%S}"
        results = {"command": command, "machine": facts, "mallocs": MALLOCS, "limits": LIMITS}
        results |= {"options": {key: getattr(options, key) for key in STORED}, "rows": [], "failures": []}
    console.print(machine.headline(results["machine"]), highlight=False, soft_wrap=True)
    done = {row["model"] for row in results["rows"]}
    results["summary"] = summarise(results["rows"])
    path = write_results(results, markdown(results), folder, stem)
    for i, name in enumerate(options.models):
        if name in done:
            continue
        try:
            with progress(console, f"{name} ({i + 1} of {len(options.models)})") as tell:
                row = measure_model(name, options, tell)
        except ChildFailed as failure:
            results["failures"].append({"model": name, "sentence": str(failure)})
        else:
            results["rows"].append(row)
            out.print("\n".join(model_lines(row)), markup=False, highlight=False, soft_wrap=True)
        results["summary"] = summarise(results["rows"])
        path = write_results(results, markdown(results), folder, stem)
    lines = summary_lines(results)
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    console.print(f"results: {path} and .md", highlight=False, soft_wrap=True)
    return results


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when a stack of ours is wrong or failed, or a model did; 2 when the options make no
    sense; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    console = Console(stderr=True)
    problem = check_options(options)
    try:
        if problem is not None:
            raise CannotResume(problem)
        command = f"python -m bench.train {shlex.join(argv)}"
        results = run(options, command, console, Console())
    except CannotResume as reason:
        console.print(f"python -m bench.train: {reason}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    ours = [e for row in results["rows"] for e in row["stacks"] if e["stack"] in ("ours", "reference")]
    return 1 if results["failures"] or any(e["status"] != "timed" for e in ours) else 0


if __name__ == "__main__":
    raise SystemExit(main())
