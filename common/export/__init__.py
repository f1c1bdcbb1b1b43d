"""From weights to files that run without TensorFlow: what the coordinator's publishing and a site's own model share.

`forward` computes what a file must, `conversion` makes it, `figures` has what is measured of it and `papers` writes
what lies beside it. TensorFlow is loaded when something is computed or converted, not before.
"""
