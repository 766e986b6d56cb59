"""Is your answer right? If not, a sentence says what is wrong with it.

    python -m course.grade iqm                one exercise
    python -m course.grade log_prob sample    several

Exit codes: 0, all are right; 1, not yet; 2, the message says why nothing could be tried.
"""

import argparse
import importlib
import importlib.util
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

from course import EXERCISES, ROOT, Wrong

SECONDS = 120  # for an answer; the slowest right one takes a tenth of it


@contextmanager
def at_most(seconds):
    """TimeoutError for what takes longer. Where there is no such signal, as on Windows: no limit"""
    def stop(*_):
        raise TimeoutError(f"it has not ended after {seconds} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault_of(check, function, file=None):
    """What a check finds wrong with a function, in a sentence; None if it is right."""
    try:
        check(function)
    except Wrong as wrong:
        return str(wrong)
    except (Exception, SystemExit) as error:  # the student's
        if "yours to write" in f"{error} {error.__cause__}":
            return whose_body(error.__cause__ or error, function)
        return f"it raises {said_by(error)}{place_in(error, file)}"
    return None


def whose_body(error, function):
    """Which function is still to be written: the answer may call another exercise's."""
    name = traceback.extract_tb(error.__traceback__)[-1].name
    if name == getattr(function, "__name__", name):
        return "its body is still to be written"
    return f"it needs {name}, whose body is still to be written"


def said_by(error):
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def place_in(error, file=None):
    """The last line of the student's file, or of any but the course's, on the way to an error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.is_relative_to(ROOT):
            continue
        found = path.relative_to(ROOT)
        others = "site-packages" in found.parts or found.parts[0] == "course"
        if found == Path(file) if file else not others:
            return f" ({found.as_posix()}, line {frame.lineno})"
    return ""


def import_fault(error, file):
    """Why there is no function to try."""
    if isinstance(error, SyntaxError):  # its text names the place
        return f"the file cannot be imported: {error}"
    place = place_in(error) or f" ({file})"
    return f"the file cannot be imported: {said_by(error)}{place}"


def function_of(exercise):
    """The function as it stands in the working tree."""
    found = importlib.import_module(exercise.module)
    for name in exercise.function.split("."):
        found = getattr(found, name)
    return found


def grade(name):
    """-> the fault of an exercise' answer, or None"""
    from course import checks
    exercise = EXERCISES[name]
    return fault_of(checks.CHECKS[name], function_of(exercise), exercise.file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m course.grade",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=EXERCISES, metavar="NAME",
                        help="of an exercise: `python -m course.blank --list`")
    names = parser.parse_args(argv).names
    if "forward_kernel" in names:
        if not importlib.util.find_spec("triton"):
            print("course.grade: forward_kernel needs the package triton (Linux only)",
                  file=sys.stderr)
            sys.exit(2)
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    faults, broken = 0, None
    for name in names:
        try:
            with at_most(SECONDS):
                fault = grade(name)
        except (Exception, SystemExit) as error:
            # The first tells: what it left half imported gives the next one another error.
            fault = broken = broken or import_fault(error, EXERCISES[name].file)
        faults += fault is not None
        print(f"{name}: not yet: {fault}" if fault else f"{name}: right")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
