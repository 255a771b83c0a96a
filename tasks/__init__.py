"""Prefect tasks: one thin task per stage, MLflow tracking and the model registry."""
