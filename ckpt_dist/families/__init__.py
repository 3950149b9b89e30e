"""Model families: one short table each. See docs/new-family.md."""
