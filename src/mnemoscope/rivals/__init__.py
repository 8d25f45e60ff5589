"""Methods of others that an arena compares with; nothing that fits or serves a model imports them."""
