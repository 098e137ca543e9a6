"""Results for people: tables, plots, contact sheets, report.html.

Reads results; computes none that training depends on.
"""
