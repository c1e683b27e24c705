"""Every plan of a list against the run that it is for: `pytest tests/plans.py`, nightly."""

import plan_cases
import pytest

OPTIONS = {
    "plain": {},
    "LoRA": {"lora_rank": 8},
    "in parts": {"gradient_checkpointing": True, "token_budget": 500, "z_norm": "match_rms"},
}


@pytest.fixture(scope="module")
def data_files(tmp_path_factory) -> dict[int, str]:
    return plan_cases.write_data(tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("architecture", plan_cases.SHAPES)
def test_a_run_needs_what_was_planned(architecture, stage, options, data_files, tmp_path):
    plan_cases.assert_planned(architecture, stage, data_files[stage], tmp_path, **options)
