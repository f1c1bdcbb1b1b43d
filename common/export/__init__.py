"""From weights to files that run without TensorFlow: what the coordinator's publishing and a site's own model share."""
