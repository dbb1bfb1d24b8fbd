"""What stands before an ingress: HAProxy, the port until there is an ingress, and the sockets that Serve opens."""
