"""What a user writes of a model, and the program that it becomes."""
