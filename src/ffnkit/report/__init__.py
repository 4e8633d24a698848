"""Measurements, tables, plots, the report page and model cards."""
