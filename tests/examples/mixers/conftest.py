"""What tests of a package's kernels start from: as those of ours."""

from tests.kernels.conftest import poisoned_memory  # noqa: F401
