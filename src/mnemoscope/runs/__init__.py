"""What is on disk and how it is trusted: files, their fields and digests, locks, worker processes, errors."""
