"""What people see of a run: one line that never becomes two, a log that is not flooded, a picture."""

import io
import json
import re
import sys

import pytest
import torch
from conftest import stage2
from rich.console import Console

from autoregembed import progress
from autoregembed.progress import Display, clock, describe, in_parts
from autoregembed.train import train

LOG = {"loss": 1.25, "align": 0.5, "nce": 2.0, "s1": 0.1, "tokens_per_second": 1234.5, "memory_gb": 1.5}


class Clock:
    """Time that passes by two seconds a look, or by what a test says."""

    now, tick = 0.0, 2.0

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now


@pytest.fixture
def time(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def shown(total: int, *, width: int = 80, terminal: bool = False, done: int = 0) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, legacy_windows=False)
    with Display(console, "stage 2", total, done) as display:
        for step in range(done + 1, total + 1):
            display.update(step, describe(LOG, ("spearman", 0.71)))
    return out.getvalue()


def test_the_numbers_that_people_want_stand_first():
    line = describe(LOG, ("spearman", 0.71234))
    assert line == "loss 1.250  spearman 0.7123  align 0.500  nce 2.000  s1 0.100  1234 tok/s  1.5 GB"
    assert [clock(x) for x in (0, 59.6, 3723)] == ["0:00", "1:00", "1:02:03"]


@pytest.mark.parametrize(("total", "least", "most"), [(3, 3, 3), (1000, 20, 22), (100_000, 20, 22)])
def test_a_log_file_is_not_flooded(total, least, most, time):
    time.tick = 0.001
    lines = shown(total, width=40).splitlines()
    assert least <= len(lines) <= most
    assert all(line.startswith("stage 2") and "loss 1.250" in line and "1.5 GB" in line for line in lines), "whole"
    assert f"{total}/{total}" in lines[-1]
    assert not any(ord(c) < 32 for line in lines for c in line)


def test_a_slow_run_speaks_every_ten_minutes(time):
    time.tick = 100.0  # seconds a step
    assert len(shown(1000).splitlines()) == pytest.approx(1000 / 7 + 20, abs=20)


def test_the_rest_is_what_a_step_took_times_the_steps(time):
    lines = shown(10, done=4).splitlines()
    assert "ETA 0:10" in lines[0], "five steps of two seconds after the first"
    assert "ETA 0:00" in lines[-1]
    assert "5/10" in lines[0]


@pytest.mark.parametrize("width", [30, 60, 200])
def test_the_line_of_a_terminal_stays_one_line(width):
    text = shown(5, width=width, terminal=True)
    # Every frame but the first begins with "back to the start of this line"; none goes up a line.
    assert not re.search(r"\x1b\[\d*A", text)
    frames = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]", text)]
    assert any("5/5" in frame and "ETA 0:00" in frame for frame in frames)
    assert any("loss 1.250" in frame for frame in frames) or width == 30
    assert max(map(len, frames)) <= width
    if width == 200:
        assert any("loss 1.250  spearman 0.7100" in frame and "1.5 GB" in frame for frame in frames)


def test_parts_come_back_in_the_order_of_the_texts(monkeypatch):
    monkeypatch.setattr(progress, "_PART", 4)
    texts = ["x" * n for n in (7, 1, 3, 9, 2, 8, 5, 5, 4, 1)]
    sizes: list[int] = []

    def encode(part: list[str]) -> torch.Tensor:
        sizes.append(len(part))
        return torch.tensor([[float(len(text))] for text in part])

    out = io.StringIO()
    found = in_parts(Console(file=out, width=80), "texts", encode, texts)
    assert found.flatten().tolist() == [len(text) for text in texts]
    assert sizes == [4, 4, 2]
    assert "10/10" in out.getvalue()
    quiet = io.StringIO()
    in_parts(Console(file=quiet), "texts", encode, texts[:4])
    assert quiet.getvalue() == ""


def test_a_run_leaves_its_picture(model_folder, alignment_file, sts_file, tmp_path):
    from PIL import Image

    out = io.StringIO()
    options = {"contrastive_weight": 1.0, "ref_margin": "none", "eval_data": sts_file, "eval_steps": 2}
    train(stage2(model_folder, alignment_file, tmp_path / "run", **options), Console(file=out, width=80))
    picture = Image.open(tmp_path / "run" / "training.png")
    assert picture.size[0] > picture.size[1] > 300
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 20, "not blank"
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in out.getvalue().splitlines() if line.startswith("stage 2")]
    assert len(lines) == len(log) == 3
    assert f"loss {log[-1]['loss']:.3f}" in lines[-1]
    assert "spearman" in lines[-1]


def test_without_matplotlib_a_run_ends_and_says_so(model_folder, alignment_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = io.StringIO()
    options = {"ref_margin": "none", "max_steps": 1}
    train(stage2(model_folder, alignment_file, tmp_path / "run", **options), Console(file=out, width=200))
    assert "training.png: not drawn, matplotlib is not installed (pip install matplotlib)" in out.getvalue()
    assert (tmp_path / "run" / "summary.json").is_file()
    assert not (tmp_path / "run" / "training.png").exists()
