"""This machine as programs of this user find it: processes, and the servers that run."""
