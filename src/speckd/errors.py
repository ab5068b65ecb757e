"""What a user can mend, in one line: what is wrong and where, then the fix. The command line prints it and exits with a code.

Exit codes: 2, a mistake to mend first; 4, the teacher's or the student's servers are lost, and the run can be resumed later; 5,
what the student writes has collapsed, and the run was stopped with a checkpoint.
"""


class SpeckdError(Exception):
    """Base of every error that a user can mend.

    Args:
        what: what is wrong and where (file, key, row).
        fix: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}. {fix}")
        self.what, self.fix = what, fix


class ConfigError(SpeckdError):
    """An unknown, mistyped or contradictory setting."""


class DataError(SpeckdError):
    """A dataset that cannot be read, or that supervises nothing."""


class VocabularyError(SpeckdError):
    """Student and teacher do not name tokens the same way."""


class CapabilityError(SpeckdError):
    """The teacher's signal does not hold what a gate or divergence needs."""


class StoreError(SpeckdError):
    """Cached teacher answers that are damaged, of something else, or cannot be written: the file is named."""


class NonFiniteError(SpeckdError):
    """Logits or losses that are NaN or infinite: raised before the optimizer sees them."""


class TeacherLostError(SpeckdError):
    """No server of the teacher or of the student's text can be asked and trusted. What was learnt until then stands."""

    exit_code = 4


class CollapseError(SpeckdError):
    """What the student writes is no text to learn from any more: it repeats itself, never ends, or is empty."""

    exit_code = 5
