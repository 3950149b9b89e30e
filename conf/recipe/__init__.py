"""Named defaults of convert's keys: recipe=NAME."""
