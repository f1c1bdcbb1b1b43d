"""The page of a run, its report, and runs beside each other: made from what lies in run folders, and nothing else.

The page is a process of its own. It asks the coordinator nothing and is asked nothing by it, so it costs a round
nothing, stays up when the coordinator goes, and says so. Imports neither TensorFlow nor gRPC.
"""
