"""The typed experiment specification, its resolution and its identity."""
