"""The coordinator: rounds, gRPC service, holdout evaluation, publishing, simulation, the `wardround` command."""

import common  # noqa: F401  (sets what gRPC and TensorFlow read when they are first imported, before any module here is)
