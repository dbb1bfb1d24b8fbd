"""The engine by role: `driver` runs the steps, `client` asks for tokens, `owner` starts and restarts it."""
