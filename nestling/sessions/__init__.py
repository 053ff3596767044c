"""Sessions: one memory per reader, of any model that reads with a state."""

from .report import Event, LevelReport, Report
from .session import Session, Snapshot

__all__ = ["Event", "LevelReport", "Report", "Session", "Snapshot"]
