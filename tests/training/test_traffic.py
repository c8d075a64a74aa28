"""What two processes send in a step is what the formulas of docs/scale.md say, to the byte."""

from pathlib import Path

import pytest

from tests.helpers import traffic

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("stage", [1, 2])
def test_bytes_counted_are_bytes_predicted(stage):
    pairs = 4
    first, second = traffic.count_in_two_processes(stage, pairs)
    for result in (first, second):
        assert result["counted"] == result["predicted"]
    if stage == 1:
        assert (first["given"], second["given"]) == (second["asked"], first["asked"])
        assert 0 < first["asked"] <= pairs, "more than the drawn negatives were fetched"
        image = (5, 48)  # positions and width of an image's features
        for (name, _, row), _size in first["raw"].items():
            assert row != image or name == "all_to_all", "image features went to a rank that did not ask for them"


def test_the_table_of_the_documentation_is_the_script_s():
    assert traffic.table() in (ROOT / "docs/scale.md").read_text(encoding="utf-8")
