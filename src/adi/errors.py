"""What adi refuses, in a sentence that names the value, what is allowed and the fix.

The command line shows an ``AdiError`` in one line and ends with exit code 2; every other
exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class AdiError(ValueError):
    """A value, file or model of the user's that cannot be used; the message is one sentence."""


class UsageError(AdiError):
    """An option, argument or combination of them that has no meaning."""


class FileError(AdiError):
    """A file or folder that is missing, damaged, of another program or version, or cannot be written."""


class ModelError(AdiError):
    """A model that cannot be found, loaded, split into blocks, exported or tokenized for."""


class NotExportableError(ModelError):
    """A model that a compiled engine cannot run; the message says why, and another engine may."""


class NoDistributionError(ModelError):
    """Logits that hold NaN or infinity, so no distribution over tokens."""


class MemoryFullError(AdiError):
    """A pass for which no KV memory is left; nothing of it has run, and it may be tried again when a sequence has ended."""
