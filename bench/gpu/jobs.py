"""Does jobs in turn in a process that may fault or hang. Another process then goes on, without the job, or the
contestant in it, that ended the first. Results so far are written after each job.

A fault poisons a process's CUDA context, and a kernel that hangs keeps it for ever. The jobs are therefore done by a
child, forked before anything has asked CUDA for anything, and its parent looks after it.
"""

import importlib
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvae.backends.settings import switch

RACE = "race"  # no contestant, but all of them in turns


class Result(NamedTuple):
    lines: list[str]  # Markdown
    summary: list[str] = []  # noqa: RUF012  # what to see first
    failures: list[str] = []  # noqa: RUF012
    numbers: Any = None


class Progress(NamedTuple):
    """The exchange between a job and the process that runs it: contestants to leave out, and the one that is next."""

    about_to: Callable[[str], None]  # begin with a contestant of this name
    bad: dict[str, str]  # contestants that ended a process, and how: to be left out


class Job(NamedTuple):
    key: str
    run: Callable[[Progress], Result]
    section: tuple[str, ...] = ()  # Markdown lines that come before the first of its kind
    work: str = ""  # what hangs for a contestant is not tried again in other jobs of the same work


class Work:
    """The jobs and what has come of them, kept in FOLDER/NAME.json, .md and .summary."""

    def __init__(self, name: str, jobs: Sequence[Job], folder: Path):
        self.name, self.jobs, self.folder = name, jobs, folder
        self.state: dict[str, Any] = {"about": {}, "done": {}, "bad": {}, "mark": "", "error": ""}

    def through(self, seconds: float, stall: float) -> bool:
        """Does all jobs, and tells whether all went well; a process at the same thing for `stall` seconds is killed."""
        until = time.monotonic() + seconds
        over = False
        import_all()
        self.write()
        assert not torch.cuda.is_initialized()  # or no child could use it
        while not over:
            child = os.fork()
            if child == 0:
                self._work()
            how = self._watch(child, until, stall)
            self.state = json.loads(self._path("json").read_text())
            if not how:
                break
            mark, error = self.state["mark"], self.state["error"]
            if mark in self.state["bad"]:  # and left out once already, so the whole job is
                mark = mark.partition(" | ")[0]
            over = how == "out of time" or mark in self.state["bad"]
            self.state["bad"][mark] = f"{how}: {error}" if error else how
            self.state["error"] = ""
            self.write()
        self.write()
        return not self.failures()

    def _watch(self, child: int, until: float, stall: float) -> str:
        """Waits for the process; how it ended, or an empty string if it ended well."""
        while True:
            late = time.monotonic() > until
            stalled = time.time() - self._path("json").stat().st_mtime > stall
            status = exit_status(child, late or stalled)
            if status == 0:
                return ""
            if status is not None and late:
                return "out of time"
            if status is not None:
                return f"HANG (over {stall:g} s)" if stalled else f"FAULT (exit status {status})"
            time.sleep(0.02)

    def _work(self) -> None:
        """Does the jobs in the child process, which ends here."""
        code = 3
        try:
            self.state["about"] = about()
            for job in self.jobs:
                if job.key not in self.state["done"] and job.key not in self.state["bad"]:
                    self._do(job)
            code = 0
        except BaseException as error:
            traceback.print_exc()
            self.state["error"] = said(error)
            self.write()
        finally:
            os._exit(code)

    def _do(self, job: Job) -> None:
        def about_to(name: str) -> None:
            self.state["mark"] = f"{job.key} | {name}" if name else job.key
            self._save()

        about_to("")
        alike = {other.key for other in self.jobs if other.work and other.work == job.work}
        bad: dict[str, str] = {}
        for mark, how in self.state["bad"].items():
            key, _, name = mark.partition(" | ")
            if key == job.key or (key in alike and how.startswith("HANG")):
                bad[name] = how
        try:
            result = job.run(Progress(about_to, bad))
        except Exception as error:
            torch.cuda.synchronize()  # raises where nothing more can be computed by this process
            traceback.print_exc()
            result = Result([f"| {job.key} | {said(error)} |"], failures=[f"{job.key}: {said(error)}"])
        self.state["done"][job.key] = result._asdict()
        self.write()
        torch.cuda.empty_cache()

    def failures(self) -> list[str]:
        done, bad = self.state["done"], self.state["bad"]
        found = [line for key in done for line in done[key]["failures"]]
        for mark, how in bad.items():  # a job that went on without a contestant says so itself
            key, _, name = mark.partition(" | ")
            found += [f"{mark}: {how}"] if key not in done or name == RACE else []
        return found + [f"{job.key}: missing" for job in self.jobs if job.key not in done and job.key not in bad]

    def write(self) -> None:
        self._save()
        done = [job for job in self.jobs if job.key in self.state["done"]]
        lines = [f"# {self.name}", "", *(f"- {name}: {value}" for name, value in self.state["about"].items())]
        section: tuple[str, ...] = ()
        for job in done:
            if job.section != section:
                section = job.section
                lines += ["", *section]
            lines += self.state["done"][job.key]["lines"]
        failures = [f"FAILED {line}" for line in self.failures()]
        self._replace("md", "\n".join([*lines, "", *failures]) + "\n")
        summary = [line for job in done for line in self.state["done"][job.key]["summary"]]
        self._replace("summary", "".join(f"{line}\n" for line in (*failures, *summary)))

    def _save(self) -> None:
        self._replace("json", json.dumps(self.state, indent=1) + "\n")

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    def _replace(self, suffix: str, text: str) -> None:
        new = self._path("new")
        new.write_text(text)
        new.replace(self._path(suffix))


def import_all() -> None:
    """Imports what each process would import by itself."""
    for module in ("triton", "torch.fx.experimental.symbolic_shapes", "fastvae.backends.triton"):
        importlib.import_module(module)


def exit_status(child: int, late: bool) -> int | None:
    """The exit status of a forked process that has ended, or that is killed as it is late; None while it runs."""
    if late:
        os.kill(child, signal.SIGKILL)
    ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def said(error: BaseException) -> str:
    """An error as one line that a Markdown table can hold."""
    return " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:300]


def about() -> dict[str, str]:
    commit = os.environ.get("FASTVAE_COMMIT") or "unknown"
    found = {"commit": commit, "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    return found | ({"trial": "tiny sizes, so no number means anything"} if switch("FASTVAE_TRIAL") else {})
