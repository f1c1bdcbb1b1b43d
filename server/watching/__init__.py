"""Watching a study from what its run folder holds: one snapshot that page, metrics, alerts, status and report share.

Everything here reads the run folder and nothing else of a coordinator, so that it works beside a coordinator, after
its end, and without it; and what it does, or cannot do, never holds up a round. Nothing here loads TensorFlow.
"""
