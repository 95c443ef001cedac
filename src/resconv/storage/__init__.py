"""Files that others can read: saved nets, exported nets, and how they are opened and compared."""
