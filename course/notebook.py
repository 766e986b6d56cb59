"""Make tour.ipynb from tour.py, which can be read and reviewed as text.

    python -m course.notebook          the cells; outputs stay where a cell is as it was
    python -m course.notebook --run    run them, keep the outputs; needs nbclient and ipykernel
"""

import argparse
import json
import sys

from course import ROOT

SCRIPT, NOTEBOOK = ROOT / "course" / "tour.py", ROOT / "course" / "tour.ipynb"


def cells_of(script):
    """The cells of a script, which begin at `# %%` or, text, at `# %% [markdown]`."""
    cells = []
    for part in ("\n" + script).split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        body = body.strip("\n")
        if "[markdown]" in head:
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.splitlines()]
            cell = {"cell_type": "markdown", "source": "\n".join(lines)}
        else:
            cell = {"cell_type": "code", "source": body, "execution_count": None, "outputs": []}
        cells.append({**cell, "id": f"cell-{len(cells)}", "metadata": {}})
    return cells


def notebook_of(cells):
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 5}


def executed(notebook, folder):
    """The notebook with the outputs of its cells, run in a folder."""
    import nbformat
    from nbclient import NotebookClient
    node = nbformat.from_dict(notebook)
    NotebookClient(node, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in node.cells:  # when each cell began would differ every time
        cell.metadata = {}
    return node


def kept(cells, path):
    """The cells, with the outputs that the same ones have in the notebook there is."""
    if not path.exists():
        return cells
    old = {cell["source"]: cell for cell in json.loads(path.read_text())["cells"]}
    return [{**old.get(cell["source"], cell), "id": cell["id"]} for cell in cells]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m course.notebook",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run it and keep the outputs")
    args = parser.parse_args(argv)
    cells = cells_of(SCRIPT.read_text())
    if args.run:
        try:
            notebook = executed(notebook_of(cells), ROOT)
        except ImportError as error:
            print(f"course.notebook: {error}; pip install nbclient ipykernel", file=sys.stderr)
            sys.exit(2)
    else:
        notebook = notebook_of(kept(cells, NOTEBOOK))
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {NOTEBOOK}")


if __name__ == "__main__":
    main()
