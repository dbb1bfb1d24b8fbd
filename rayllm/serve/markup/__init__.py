"""Code and formulas of answers, as data that the chat page makes nodes of."""
