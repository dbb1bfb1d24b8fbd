"""What runs in the process of whoever asks: connections to a driver, the journal of open requests, outputs."""
