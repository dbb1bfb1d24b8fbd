"""Drawing the next token from logits. `reference.py` is plain torch: the definition, and the CPU path."""
