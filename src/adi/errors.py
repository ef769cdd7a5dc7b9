"""What adi refuses, and says so in a sentence: the value, what is allowed and the fix.

The command line tells an ``AdiError`` in one line and ends with exit code 2; every other
exception is a bug and shows its traceback.
"""

from __future__ import annotations


class AdiError(ValueError):
    """Something that the user gave (a value, a file, a model) cannot be meant or used; the message is one sentence."""
