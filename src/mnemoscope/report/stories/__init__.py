"""The stories of the report: each says what it measures of a cell, as rows, and what it shows of it.

What its figures and numbers mean is in the YAML file of its name.
"""
