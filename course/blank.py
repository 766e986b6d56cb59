"""Take a function's body out of the working tree, so that you can write it again.

    python -m course.blank --list             the exercises, and where each stands
    python -m course.blank iqm                the body of eval.iqm is yours to write
    python -m course.grade iqm                is it right?
    python -m course.blank iqm --restore      the repository's own again; your answer is kept

Only that function is touched. It is refused if it has changes that git does not know, for they
would be lost. What was taken out, and your answer, are kept in course/answers/, which git ignores.
An answer never replaces another: the older one gets a number, as in iqm-1.py.
"""

import argparse
import ast
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

from course import EXERCISES, ROOT

ANSWERS = "course/answers"


class Refused(Exception):
    """The message says what was wrong, and what to do."""


# ---------------------------------------------------------------- functions as text

def find(text, function):
    """The ast node of a function, such as "Policy.log_prob"; None if there is none.

    Of several with one name it is the last, as for Python.
    """
    body, node = ast.parse(text).body, None
    for name in function.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next((n for n in reversed(body) if isinstance(n, kinds) and n.name == name), None)
        if node is None:
            return None
        body = node.body
    return node


def split(text):
    """The lines as Python counts them: str.splitlines also ends one at a form feed."""
    return io.StringIO(text).readlines()


def lines_of(node):
    """The lines of a function, its decorators with it, as a slice of the file's."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return slice(first - 1, node.end_lineno)


def source_of(text, function):
    """The text of a function."""
    return "".join(split(text)[lines_of(find(text, function))])


def replaced(text, function, source):
    """The text with another `source` in the function's place."""
    lines = split(text)
    lines[lines_of(find(text, function))] = [source]
    return "".join(lines)


def blanked(text, function):
    """The text without the function's body; signature and docstring stay."""
    node, lines = find(text, function), split(text)
    first = node.body[0].lineno - 1
    if ast.get_docstring(node):
        first = node.body[0].end_lineno
    else:
        while lines[first - 1].lstrip().startswith("#"):  # a comment may tell how it is done
            first -= 1
    indent = " " * node.body[0].col_offset
    lines[first:node.end_lineno] = [f'{indent}raise NotImplementedError("yours to write")\n']
    return "".join(lines)


# ---------------------------------------------------------------- the working tree

def read(path):
    return path.read_text(encoding="utf-8-sig")  # some editors put a mark first


def write(path, text):
    """Replace a file in one step."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def committed(root, file):
    """A file's text as it was last committed."""
    command = ["git", "show", f"HEAD:./{file}"]
    try:
        ran = subprocess.run(command, cwd=root, capture_output=True)
    except FileNotFoundError:
        raise Refused("git is not installed: it keeps what is taken out") from None
    if ran.returncode:
        raise Refused(f"{file} is not known to git here: clone the repository, and work there")
    return ran.stdout.decode("utf-8")


def paths(root, name):
    """The exercise's file, what was taken out of it, and the student's answer."""
    answers = Path(root, ANSWERS)
    return Path(root, EXERCISES[name].file), answers / f"{name}.before", answers / f"{name}.py"


def checked(path, function):
    """A file's text, in which the function can be found."""
    try:
        text = read(path)
        if find(text, function):
            return text
    except SyntaxError as error:
        raise Refused(f"{path.name}, line {error.lineno}: {error.msg}: mend this first") from None
    except ValueError as error:  # not UTF-8, or a zero byte
        raise Refused(f"{path.name}: {error}: mend this first") from None
    raise Refused(f"{path.name} has no {function} any more: bring its first line back")


def blank(root, name):
    path, before, _ = paths(root, name)
    function, file = EXERCISES[name].function, EXERCISES[name].file
    text = checked(path, function)
    source, known = source_of(text, function), committed(root, file)
    if before.exists() and read(before) != source:  # the same: git brought the body back
        raise Refused(f"{name} is taken out already: write it, or bring it back with "
                      f"`python -m course.blank {name} --restore`")
    if find(known, function) is None or source_of(known, function) != source:
        raise Refused(f"{function} in {file} has changes that are not committed, and would be "
                      "lost: commit them first")
    write(before, source)
    write(path, blanked(text, function))
    line = find(text, function).lineno
    return (f"{file}, line {line}: {function} is yours to write; then: "
            f"python -m course.grade {name}")


def keep(answer, source):
    """Store an answer, and what is to be said of it. Another one that is there gets a number."""
    if answer.exists() and read(answer) == source:
        return f"your answer is in {answer} already"
    said = f"your answer is in {answer}"
    if answer.exists():
        numbered = (answer.with_stem(f"{answer.stem}-{n}") for n in itertools.count(1))
        older = next(path for path in numbered if not path.exists())
        answer.rename(older)
        said += f", the one before it in {older.name}"
    write(answer, source)
    return said


def restore(root, name):
    path, before, answer = paths(root, name)
    function = EXERCISES[name].function
    if not before.exists():
        raise Refused(f"{name} is not taken out")
    text, own = checked(path, function), read(before)
    source, whole = source_of(text, function), replaced(text, function, own)
    empty = source_of(blanked(whole, function), function)
    said = "no new answer to keep" if source in (own, empty) else keep(answer, source)
    write(path, whole)
    before.unlink()
    return f"{path.name}: {function} is the repository's own again; {said}"


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m course.blank",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=EXERCISES, metavar="NAME")
    parser.add_argument("--restore", action="store_true", help="bring the body back")
    parser.add_argument("--list", action="store_true", help="the exercises there are")
    args = parser.parse_args(argv)
    if args.list:
        for name, exercise in EXERCISES.items():
            print(f"{name:<20} {exercise.function} in {exercise.file}")
        return
    if not args.name:
        parser.error("name an exercise: --list shows them")
    try:
        print(restore(root, args.name) if args.restore else blank(root, args.name))
    except (Refused, OSError) as error:
        print(f"course.blank: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
