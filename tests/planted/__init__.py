"""Methods of a user's own, a file each: a shift, an edit, and a decoding rule."""
