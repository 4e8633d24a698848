"""Tables of rows, whatever the task: where they are, files that are read, seeded splits."""
