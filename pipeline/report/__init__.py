"""Results for people: which models are compared, tables, plots, contact sheets, report.html.

Reads weights, stores and curves; nothing that training, a store or a fingerprint depends on is computed here.
"""
