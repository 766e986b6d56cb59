"""Is your answer right? If not, a sentence says what is wrong with it.

    python -m course.grade iqm                one exercise
    python -m course.grade log_prob sample    several

Exit codes: 0, all are right; 1, not yet; 2, the message says why nothing could be tried.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import traceback

from course import EXERCISES, ROOT, Wrong


def fault_of(check, function, file=None):
    """What a check finds wrong with a function, in a sentence; None if it is right."""
    try:
        check(function)
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:  # the student's
        if "yours to write" in f"{error} {error.__cause__}":
            return "its body is still to be written"
        return f"it raises {type(error).__name__}: {error}{place_in(error, file)}"
    return None


def place_in(error, file):
    """Where in the student's file an error arose."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if file and frame.filename == str(ROOT / file):
            return f" ({file}, line {frame.lineno})"
    return ""


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
    faults = 0
    for name in names:
        try:
            fault = grade(name)
        except (SyntaxError, AttributeError, ImportError) as error:
            fault = f"the file cannot be imported: {error}"
        faults += fault is not None
        print(f"{name}: not yet: {fault}" if fault else f"{name}: right")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
