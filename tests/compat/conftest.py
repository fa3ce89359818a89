"""What holds of a solve by whoever takes its steps holds behind the names of others as well."""

from tests.solvers.conftest import backend  # noqa: F401
