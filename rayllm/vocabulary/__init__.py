"""Tokenizers whose files hold no `tokenizer.json` and whose class is Python code beside them, which is never run."""
