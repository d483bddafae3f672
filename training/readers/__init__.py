"""Readers of label formats, one a file; `training.data` finds them by name. Each gives rows of the form `SegmentationRow`."""
