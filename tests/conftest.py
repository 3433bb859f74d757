"""Settings for all tests."""

from hypothesis import settings

# A slow machine is no bug, and a failure must come back on the next run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
