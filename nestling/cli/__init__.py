"""The command line: `nestling COMMAND`, one short file per command (main.py lists them)."""
