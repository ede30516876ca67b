"""The HTTP server: policies, the live model, and one page. Loopback by default, strict JSON both ways."""
