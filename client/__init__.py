"""The site: the agent that dials out, its data and its training, the `wardround-site` command."""

import common  # noqa: F401  (sets what gRPC and TensorFlow read when they are first imported, before any module here is)
