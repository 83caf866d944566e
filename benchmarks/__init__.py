"""Measurements. Every figure is a row of results.csv, appended by a script and never by hand."""
