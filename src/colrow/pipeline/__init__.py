"""Pipelines: schedules and their bubbles, and what a step did on every rank."""
