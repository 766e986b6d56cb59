"""Everything that measures, one script a question: `python -m studies.NAME`. See README.md."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"


def print_table(head, rows):
    """In markdown. Cells are anything that can be printed."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(map(str, row))} |")
