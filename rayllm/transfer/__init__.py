"""Moving a step's arrays to the device, and its results back, in one copy each way."""
