"""Launchers: what starts the processes of a run where torchrun does not."""
