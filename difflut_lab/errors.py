"""Errors that a person running the program can mend: told in one line, without a traceback."""


class UserError(ValueError):
    """Base of the errors whose message alone says what is wrong and what is allowed."""


class ConfigError(UserError):
    """A configuration key, value or name that cannot be used."""


class DataError(UserError):
    """A data set that cannot be read or that does not hold what it must."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or that belongs to another network."""


class TrainingError(UserError):
    """A training that cannot go on, for example because its loss is no longer finite."""
