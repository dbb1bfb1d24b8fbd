"""The text of an answer to events: tool calls, reasoning and plain text, and the grammars that calls follow."""
