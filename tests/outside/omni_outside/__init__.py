"""Stages that nothing in the pipeline knows of."""
