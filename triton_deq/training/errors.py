"""What stops a training run; each message names the remedy."""


class TrainingError(RuntimeError):
    """Training cannot go on, or not begin."""


class CheckpointError(TrainingError):
    """A checkpoint could not be written or read, or is of another run."""


class NonFinite(TrainingError):
    """The loss or its gradient is NaN or infinite."""


class Interrupted(TrainingError):
    """SIGINT or SIGTERM came; the message says where the checkpoint is and how to go on."""
