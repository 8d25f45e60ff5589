"""Vectors and detectors elsewhere than in transformers: inside vLLM, baked into checkpoints, in llama.cpp, on a hub.

``plugin`` is what vLLM loads; it is off until it is given a run. ``admission``: what a server offers, what requests ask
of it, and the key of their cached blocks; ``worker`` reads and shifts the rows of a pass; ``engine`` and ``http``
connect these with vLLM, which is imported in functions only. ``proof`` asks a server through ``client`` and compares
with transformers (``served``). ``export`` is for programs that take files.
"""
