# SPDX-License-Identifier: Apache-2.0
"""Figures of the two READMEs stand in the result files that they link."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "examples/README.md"])
def test_figures_stand_in_the_linked_result_files(page):
    path = ROOT / page
    text = path.read_text(encoding="utf-8")

    def linked(part):
        return [(path.parent / link).read_text(encoding="utf-8") for link in re.findall(r"\]\(([^)#]*\.md)\)", part)]

    of_page, count = linked(text), 0
    for line in text.splitlines():
        files = linked(line) or of_page
        for figure in re.findall(r"[\d.]+ ± [\d.]+", line):
            assert any(figure in file for file in files), (figure, line)
            count += 1
    assert count
