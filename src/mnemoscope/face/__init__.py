"""What users call: ``fit``, ``Fitted``, ``check``."""
