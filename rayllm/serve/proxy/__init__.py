"""What stands before an ingress: HAProxy, and the port until there is an ingress."""
