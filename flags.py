"""The types of the commands' flags: numbers within a range.

Nothing here imports torch, which takes seconds: a typing error is answered at once.
"""

import argparse
import math


def number(kind, words, allowed):
    """The type of a flag that takes some numbers alone; words: which."""

    def read(text):
        if not allowed(kind(text)):
            raise argparse.ArgumentTypeError(f"{text}: it has to be {words}")
        return kind(text)

    read.__name__ = kind.__name__  # argparse names it where a text is no number at all
    return read


COUNT = number(int, "1 or more", lambda x: x >= 1)
NATURAL = number(int, "0 or more", lambda x: x >= 0)
POSITIVE = number(float, "above 0", lambda x: 0 < x < math.inf)
