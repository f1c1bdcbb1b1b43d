"""The hospital's own page: what its site does now, what left, what was allowed, and how long all that holds.

Reads the work folder, and writes nothing. It is served on loopback alone: a site opens no port to anybody.
"""
