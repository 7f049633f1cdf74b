"""Video pipelines of tiny random components."""

from . import PipelineEntry

ENTRIES: tuple[PipelineEntry, ...] = ()
