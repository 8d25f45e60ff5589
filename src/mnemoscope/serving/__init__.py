"""Steering and reading inside vLLM: a plugin that is off until it is given a run.

``plugin`` is what vLLM loads. ``asking`` reads what a request asks for, refuses it, and gives its cached blocks a key;
``offered`` are the vectors and detectors that a server has; ``rows`` finds the rows of a pass that requests concern;
``worker`` reads and shifts them; ``engine`` and ``http`` connect these with vLLM, which is imported in functions only.
"""
