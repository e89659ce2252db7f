"""The ways a run ends early."""


class InputError(ValueError):
    """What the caller gave cannot be used: one sentence that says what was wrong, what was expected and what to do.

    Raised before the expensive work (before any weight is read). The command line prints it on one line of
    stderr and exits with status 2; every other exception is a failure and exits with status 1.
    """


class NumericalError(ArithmeticError):
    """The model produced NaN or infinity: reported with its place, never averaged into a result."""


class RankError(RuntimeError):
    """A rank raised, died or was killed: `rank` is its number, the text its traceback or last words."""

    def __init__(self, text: str, rank: int) -> None:
        super().__init__(text)
        self.rank = rank


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended long work: the sentence says where it stood and what is kept."""
