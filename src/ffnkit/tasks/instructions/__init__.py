"""Instructions and dialogues: the task, its sets, the forms of their rows, chat templates."""
