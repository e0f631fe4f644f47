"""The one exception that foveate raises for what a user can put right."""


class FoveateError(ValueError):
    """Something asked for that can't be done, as a sentence: what was asked, why it can't be, what to do.

    The command line prints the sentence and exits with 2. Anything else that escapes is a bug of foveate's.

    Example:
        >>> from foveate.errors import FoveateError
        >>> raise FoveateError("keep=1.5 is no fraction: give a number above 0 and at most 1.")
        Traceback (most recent call last):
        ...
        foveate.errors.FoveateError: keep=1.5 is no fraction: give a number above 0 and at most 1.
    """
