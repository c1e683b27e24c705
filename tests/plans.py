"""Every plan of a list against the run that it is for: `pytest tests/plans.py`, nightly.

`python tests/plans.py` prints the table of them, planned and measured.
"""

import itertools
import tempfile
from pathlib import Path

import plan_cases
import pytest

OPTIONS = {
    "plain": {},
    "LoRA": {"lora_rank": 8},
    "in parts": {"gradient_checkpointing": True, "token_budget": 500, "z_norm": "match_rms"},
    "selective": {"gradient_checkpointing": "selective", "decoder_gradient_checkpointing": "selective"},
    "distilled": {"alignment_weight": 0.0, "distillation_weight": 1.0},
}
CASES = [case for case in itertools.product(plan_cases.SHAPES, (1, 2), OPTIONS) if case[1:] != (1, "distilled")]


@pytest.fixture(scope="module")
def data_files(tmp_path_factory) -> dict[int, str]:
    return plan_cases.write_data(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize(("architecture", "stage", "kind"), CASES)
def test_a_run_needs_what_was_planned(architecture, stage, kind, data_files, tmp_path):
    plan_cases.assert_planned(architecture, stage, data_files[stage], tmp_path, **OPTIONS[kind])


def report() -> None:
    """A line for every stretch of every case: MB beyond the imported libraries, and planned over measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = plan_cases.write_data(folder)
        for architecture, stage, kind in CASES:
            place = folder / f"{architecture}-{stage}-{kind}".replace(" ", "-")
            place.mkdir()
            planned, measured = plan_cases.compared(architecture, stage, files[stage], place, **OPTIONS[kind])
            for stretch, size in planned.items():
                found = measured.get(stretch, 0.0)
                ratio = f"{size / found:5.2f}" if found > 0 else "    -"
                line = f"{architecture:9} {stage} {kind:9} {stretch:20} {size / 1e6:7.0f} {found / 1e6:7.0f} {ratio}"
                print(line, flush=True)
            peaks = max(planned.values()), max(measured.values())
            print(f"{architecture:9} {stage} {kind:9} {'peak':20} {peaks[0] / 1e6:7.0f} {peaks[1] / 1e6:7.0f}"
                  f" {peaks[0] / peaks[1]:5.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    report()
