"""Metrics: one `evaluate.Metric` a folder, each over plain functions that need neither it nor this package."""
