"""Runs of the scripts as a user starts them, in processes of their own, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent
# As little as shows that everything works: one batch.
SHORT = ("train.total_dialog_turns=256", "eval.num_prompts=20", "eval.frequency=0", "logging.backend=none")
# The engine that starts fastest; for what does not depend on which it is.
LIGHT = ("inference_model.backend=transformers",)
# Wall-clock figures, which no two runs share.
TIMES = ("_seconds", "_per_second")


class Run:
    """A run of a script with `ei_tiny`, started at once.

    Args:
        run_dir: the run directory.
        overrides: further arguments of the command line.
        script: a file of the repository.
        cwd: where the user stands.
    """

    def __init__(self, run_dir, *overrides, script="expert-iteration-sync.py", cwd=None):
        self.dir = Path(run_dir)
        self._mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(REPO / script),
                f"mode={Path(script).stem.rpartition('-')[2]}",
                "--config-name",
                "ei_tiny",
                f"hydra.run.dir={self.dir}",
                *overrides,
            ],
            cwd=cwd,
            # Every process that a run starts inherits this, whoever its parent is.
            env=os.environ | {"EXPERT_ITERATION_TEST": self._mark, "WANDB_MODE": "offline"},
            start_new_session=True,
            # Where the tests themselves run in the background of a shell, SIGINT is ignored, and would be here too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self):
        """Wait for the end; what the terminal showed is then `output`."""
        self.output, _ = self.process.communicate()
        return self

    def wait_for_line(self, text):
        """Wait until the metrics contain a text."""
        path = self.dir / "metrics.jsonl"
        while not (path.exists() and text in path.read_text()):
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.2)

    @property
    def summary(self):
        """The content of summary.json."""
        return json.loads((self.dir / "summary.json").read_text())

    @property
    def metrics(self):
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    def processes_left(self):
        """Processes of this run that are still there (a killed one may take a moment to be gone)."""
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left

    def processes(self):
        """Processes of this run that are there now."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process):
        try:
            return process.environ().get("EXPERT_ITERATION_TEST") == self._mark
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False


def without_times(lines):
    """Metrics without what no two runs share."""
    return [
        {
            name: value
            for name, value in line.items()
            if name != "time" and "/time/" not in name and not name.startswith("timeit/") and not name.endswith(TIMES)
        }
        for line in lines
    ]


def shown(lines, name):
    """The values of one metric, in order."""
    return [line[name] for line in lines if name in line]
