"""Keys that several verbs have."""
