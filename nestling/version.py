"""The version, in one place: read by the build and shown by `nestling --version`."""

__version__ = "0.1.0"
