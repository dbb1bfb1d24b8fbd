"""What runs in the driver: the step loop and the sockets of its clients."""
