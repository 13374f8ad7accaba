"""Every family of the table in docs/families.md, against transformers' own model, row by row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks.families import CASES, Case, examine

ONE_BY_ONE = {
    "qwen3_next", "gemma2", "granitemoehybrid", "gpt_neo", "gptj", "gpt_oss", "codegen", "xglm", "mpt", "falcon",
    "falcon_h1", "falcon_mamba", "mamba", "mamba2", "rwkv", "recurrent_gemma", "bamba", "jamba", "zamba2", "lfm2",
}  # fmt: skip
REFUSED = {"bert", "t5"}
STOCK_LOSS = {"gemma2", "recurrent_gemma"}
RECURRENT = {"mamba", "mamba2", "falcon_mamba", "rwkv", "bamba", "jamba", "recurrent_gemma", "lfm2"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_family(case: Case) -> None:
    outcome = examine(case)
    if case.model_type in REFUSED:
        assert outcome.result == "refused"
        return
    assert outcome.loss_gap <= 1e-6
    assert outcome.gradient_gap <= 3e-6
    assert outcome.result == ("unpacked" if case.model_type in ONE_BY_ONE else "packed"), outcome.reasons
    assert outcome.loss == ("stock" if case.model_type in STOCK_LOSS else "fused"), outcome.reasons
    # One sentence for each thing that is not used, and none for what is.
    assert len(outcome.reasons) == (outcome.result == "unpacked") + (outcome.loss == "stock")
    if case.model_type in RECURRENT:
        assert "see each other" in outcome.reasons[-1]


def test_the_table_in_docs_names_every_case() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| (.+?) \| (packed|unpacked|refused) \|", text, flags=re.M)
    assert [name for name, _ in named] == [case.name for case in CASES]
    assert len({case.model_type for case in CASES}) >= 25
