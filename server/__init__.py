"""The coordinator: rounds, gRPC service, holdout evaluation, publishing, simulation, the `wardround` command."""
