"""The site: the agent that dials out, its data and its training, the `wardround-site` command."""
