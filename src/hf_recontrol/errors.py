"""The errors of the package. Each message says what was wrong, what was expected, and how to mend it."""


class HeadError(ValueError):
    """A head's folder or repository holds something that is not a head: damaged, incomplete, hostile or too new."""


class HeadUnavailable(OSError):  # noqa: N818 (an established name reads better than HeadUnavailableError)
    """A head could not be fetched: no network, no such repository, no access. The Hub's error is its cause."""


class HeadMismatch(ValueError):  # noqa: N818
    """A sound head that does not fit this model: another hidden size, or another base model under recontrol_strict."""


class SteeringNotApplied(RuntimeError):  # noqa: N818
    """Control was asked for, and a forward pass came back without it. No text is returned in that case."""


class CollectError(RuntimeError):
    """Rollouts could not be collected, stored or read. What was committed before is kept."""
